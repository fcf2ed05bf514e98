"""An exported graph equals its model, accepts any batch size and contains the labels; a wrong graph is not written."""

import json
import sys

import pytest
import torch
from torch import nn

import vitarium
from vitarium.catalog.calling import call, example_inputs
from vitarium.efficiency import export as exporting
from vitarium.efficiency.export import compare, export
from vitarium.efficiency.profiler import example_image
from vitarium.efficiency.quantization.layers import Packed, QuantizedLinear
from vitarium.efficiency.quantization.mptq_vit import MPTQ
from vitarium.errors import CheckpointError, MissingExtra, UsageError
from vitarium.ops.number_formats import parse_format

onnx = pytest.importorskip("onnx")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = vitarium.create_model("timm/resnet_pico", num_classes=3)
    model.labels = ["cat", "dog", "emu"]
    return model


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_the_file_equals_the_model_at_any_batch(model, tmp_path, format):
    modes = [m.training for m in model.modules()]
    done = export(model, tmp_path / "sub" / "model", format=format)
    assert done.error < 1e-5
    assert done.bytes == done.path.stat().st_size
    assert [m.training for m in model.modules()] == modes
    graph = exporting.FORMATS[format][1](done.path)
    for batch in (1, 2, 5):
        image = example_image(model, 16, batch)
        torch.testing.assert_close(graph(image), model.eval()(image), rtol=1e-4, atol=1e-5)


def test_a_fixed_batch_is_fixed(model, tmp_path):
    done = export(model, tmp_path / "model.onnx", batch=2)
    shape = onnx.load(done.path).graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [2, 3, 16, 16]


def test_the_onnx_file_names_its_axes_and_remembers_the_model(model, tmp_path):
    written = onnx.load(export(model, tmp_path / "model.onnx").path)
    assert written.graph.input[0].name == "image"
    assert written.graph.output[0].name == "logits"
    assert written.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    record = json.loads({p.key: p.value for p in written.metadata_props}["vitarium"])
    assert record["labels"] == ["cat", "dog", "emu"]
    assert record["preprocessing"]["image_size"] == 16


def tamper(path):
    """Change one weight of a written ONNX file."""
    graph = onnx.load(path)
    tensor = next(t for t in graph.graph.initializer if len(t.dims) == 4)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.1, tensor.name))
    onnx.save(graph, path)


def test_a_tampered_graph_is_deleted_and_the_old_file_kept(model, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_text("the old one")
    write, read, packages = exporting.FORMATS["onnx"]

    def write_wrong(program, where, record):
        write(program, where, record)
        tamper(where)

    monkeypatch.setitem(exporting.FORMATS, "onnx", (write_wrong, read, packages))
    with pytest.raises(CheckpointError, match=r"differs from the model by .* was not written"):
        export(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "the old one"


def test_outputs_that_are_not_numbers_never_pass(model):
    assert compare(lambda image: model.eval()(image) * float("nan"), model.eval(), 16, [1, 2]) != 0
    assert not compare(lambda image: model(image) * float("nan"), model, 16, [1]) <= 1e9
    assert compare(lambda image: model(image)[:, :2], model, 16, [1]) == float("inf")


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, image):
        pooled = image.mean((2, 3))
        return self.layer(pooled) if pooled.sum() > 0 else self.layer(-pooled)


def test_a_model_that_cannot_be_traced_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"Untraceable cannot be traced at \(2, 3, 8, 8\)"):
        export(Untraceable(), tmp_path / "model.onnx", image_size=8)
    assert not list(tmp_path.iterdir())


def test_wrong_options_name_what_is_accepted(model, tmp_path):
    with pytest.raises(UsageError, match="did you mean onnx"):
        export(model, tmp_path / "x", format="onxx")
    with pytest.raises(UsageError, match="at least 1"):
        export(model, tmp_path / "x", batch=0)


def test_missing_onnx_names_the_line_that_installs_it(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"pip install 'vitarium\[export\]'"):
        export(model, tmp_path / "model.onnx")


@pytest.mark.parametrize("method", ["evit:keep=0.7,blocks=[0]", "tome:r=2", "pitome:keep=0.9"])
def test_a_model_with_fewer_tokens_is_exported(method, tmp_path):
    torch.manual_seed(0)
    model = vitarium.create_model("timm/vit_pico", num_classes=10, image_size=16, depth=2).eval()
    vitarium.apply(model, method, quiet=True)
    assert export(model, tmp_path / "reduced.onnx").error < 1e-5


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_denoiser_is_exported_with_named_inputs(tmp_path, format):
    torch.manual_seed(0)
    dit = vitarium.create_model("dit_pico").eval()
    with torch.no_grad():
        for parameter in dit.parameters():  # its last layer begins at zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    done = export(dit, tmp_path / "dit", format=format)
    assert done.error < 1e-5
    graph = exporting.FORMATS[format][1](done.path)
    inputs = example_inputs(dit, 5, seed=1)
    torch.testing.assert_close(graph(*inputs.values()), call(dit, inputs), rtol=1e-4, atol=1e-4)
    if format == "onnx":
        written = onnx.load(done.path)
        assert [value.name for value in written.graph.input] == ["x", "t", "labels"]
        assert [value.name for value in written.graph.output] == ["output"]
        assert {value.type.tensor_type.shape.dim[0].dim_param for value in written.graph.input} == {"batch"}
        record = json.loads({p.key: p.value for p in written.metadata_props}["vitarium"])
        assert record["inputs"]["labels"] == {"shape": [], "dtype": "int64"}


class Two(nn.Module):
    """A model of two outputs with names."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)

    def forward(self, image):
        maps = self.layer(image)
        return {"logits": maps.mean((2, 3)), "maps": maps}


def test_outputs_of_several_tensors_have_names_and_are_all_compared(tmp_path):
    model = Two()
    done = export(model, tmp_path / "two.onnx", image_size=8)
    assert [value.name for value in onnx.load(done.path).graph.output] == ["logits", "maps"]
    assert compare(lambda image: [model(image)["logits"], 2 * model(image)["maps"]], model, 8, [1]) == pytest.approx(1)


def test_a_named_tuple_of_outputs_keeps_its_names_or_is_refused_with_a_way_out(tmp_path):
    torch.manual_seed(0)
    model = vitarium.create_model("thorax_mae_pretrain_pico").eval()
    done = export(model, tmp_path / "mae.onnx")
    graph = onnx.load(done.path).graph
    assert [value.name for value in graph.input] == ["image", "noise"]
    assert [value.name for value in graph.output] == ["prediction", "hidden", "latent"]
    with pytest.raises(UsageError, match="choose --format onnx"):
        export(model, tmp_path / "mae.pt2", format="torch-export")
    assert [path.name for path in tmp_path.iterdir()] == ["mae.onnx"]


CALIBRATION = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("options", "integer", "fused"),
    [
        ("int8", 5, {"MatMulInteger": 5}),
        ("int4w", 5, {}),
        ("bits=8", 6, {"MatMulIntegerToFloat": 4}),
        ("bits=4,gelu=opt_m", 6, {"MatMulIntegerToFloat": 4}),
    ],
)
def test_a_quantized_model_runs_in_integers_in_onnxruntime(options, integer, fused, tmp_path):
    """int8 weights with our steps in the file; integer products where the layer has them, after onnxruntime's optimization, too."""
    import onnxruntime

    torch.manual_seed(0)
    model = vitarium.create_model("timm/vit_pico", num_classes=10, image_size=16, depth=1).eval()
    if options.startswith("int"):
        vitarium.apply(model, options, quiet=True)
    else:
        bits, _, gelu = options.partition(",gelu=")
        vitarium.apply(model, MPTQ(bits=int(bits[5:]), gelu=gelu or "auto", search="minmax", calibration=CALIBRATION), quiet=True)
    done = export(model, tmp_path / "q.onnx")
    assert done.error < 1e-5
    assert done.integer == integer
    graph = onnx.load(done.path).graph
    assert sum(tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) >= 2 for tensor in graph.initializer) == integer
    assert {"DequantizeLinear"} <= {node.op_type for node in graph.node}
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath, settings.log_severity_level = str(tmp_path / "run.onnx"), 3
    onnxruntime.InferenceSession(done.path, settings, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node]
    assert {kind: kinds.count(kind) for kind in fused} == fused


def test_a_number_format_that_onnx_lacks_is_refused_with_what_works(tmp_path):
    model = vitarium.create_model("timm/vit_pico", num_classes=10, image_size=16).eval()
    model.head = QuantizedLinear.of(model.head, Packed.of(model.head.weight, parse_format("e2m1"), torch.ones(10)), None)
    with pytest.raises(UsageError, match=r"the weight of head is e2m1 in 10 groups: .*--format torch-export takes any"):
        export(model, tmp_path / "q.onnx")
    assert export(model, tmp_path / "q.pt2", format="torch-export").error < 1e-5


def test_one_rounding_that_goes_the_other_way_does_not_fail_a_quantized_graph(model):
    model = model.eval()
    calls = iter(range(100))

    def graph(image):
        out = model(image)
        return out + 0.02 * out.abs().max() if next(calls) == 0 else out

    assert compare(graph, model, 16, [1], rounded=True) < 1e-6
    assert compare(lambda image: model(image) * 1.01, model, 16, [1, 3], rounded=True) == pytest.approx(0.01, rel=1e-2)
    assert compare(lambda image: model(image) * (10 if len(image) == 1 else 1), model, 16, [1, 3], rounded=True) > 1


@pytest.mark.parametrize("name", ["drct_pico", "kmax_deeplab_pico"])
def test_dense_models_are_traced_with_a_variable_batch(name):
    torch.manual_seed(0)
    small = dict(depths=[1], embed_dim=16) if name == "drct_pico" else {}
    model = vitarium.create_model(name, **small).eval()
    program = exporting._trace(model, example_inputs(model, 2, 32), dynamic=True)
    assert program.range_constraints


def test_advice_is_given_only_where_it_works(tmp_path):
    class OneImage(nn.Module):
        """Takes any fixed batch, and no variable one."""

        def forward(self, image):
            return torch.cat([image[i : i + 1].mean((2, 3)) for i in range(len(image))])

    with pytest.raises(UsageError, match=r"a fixed batch works: --batch 1$"):
        export(OneImage(), tmp_path / "m.onnx", image_size=8)
    assert export(OneImage(), tmp_path / "m.onnx", image_size=8, batch=1).error < 1e-6
    with pytest.raises(UsageError, match=r"cannot be traced") as refused:
        export(Untraceable(), tmp_path / "m.onnx", image_size=8)
    assert "--batch" not in str(refused.value)
    with pytest.raises(UsageError, match=r"ONNX lacks.*--format torch-export writes it"):
        export(Exotic(), tmp_path / "m.onnx", image_size=8)
    assert export(Exotic(), tmp_path / "m.pt2", image_size=8, format="torch-export").error == 0


class Exotic(nn.Module):
    """Calls an operator without a counterpart in ONNX."""

    def forward(self, image):
        return torch.special.bessel_j0(image).mean((2, 3))
