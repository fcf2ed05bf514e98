"""Common behaviour of methods: order, reports, undo, files; with two toy methods for any network."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import vitarium
from vitarium.catalog import methods as registry
from vitarium.catalog.applying import methods_on
from vitarium.catalog.index import entry_of
from vitarium.catalog.methods import AttachReport, Method, build_method, list_methods, method, parse_method
from vitarium.errors import AttachError, UsageError


class Doubled(nn.Module):
    """A convolution whose weight is stored as int8, to stand for a quantizer."""

    def __init__(self, conv: nn.Conv2d, bits: int):
        super().__init__()
        self.stride, self.padding, self.bits = conv.stride, conv.padding, bits
        self.register_buffer("packed", (conv.weight.detach() * 2**bits).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.conv2d(x, self.packed.float() / 2**self.bits, None, self.stride, self.padding)


@pytest.fixture(autouse=True)
def toy_methods():
    @method("toy_prune", kind="prune")
    @dataclass(frozen=True)
    class Prune(Method):
        share: float = 0.5
        keeps_weights: ClassVar[bool] = False

        def attach(self, model: nn.Module) -> AttachReport:
            report = AttachReport(self, sites=tuple(n for n, p in model.named_parameters() if p.ndim > 1))
            for name in report.sites:
                weight = model.get_parameter(name)
                report.tensors[name] = weight.detach().clone()
                with torch.no_grad():
                    weight[weight.abs() < weight.abs().quantile(self.share)] = 0
            return report

        def rebuild(self, model: nn.Module, state: Any) -> AttachReport:
            return AttachReport(self, sites=("weights",))

    @method("toy_quant", kind="quantize")
    @dataclass(frozen=True)
    class Quant(Method):
        bits: int = 5
        calibration: Any = field(default=None, metadata={"saved": False})
        fail: bool = False
        keeps_weights: ClassVar[bool] = False

        def __post_init__(self) -> None:
            if not 1 <= self.bits <= 7:
                raise UsageError(f"bits must be 1 to 7, got {self.bits}")

        def attach(self, model: nn.Module) -> AttachReport:
            return self.rebuild(model, {"bits": self.bits})

        def rebuild(self, model: nn.Module, state: Any) -> AttachReport:
            report = AttachReport(self, state=dict(state))
            for name, part in list(model.named_modules()):
                if isinstance(part, nn.Conv2d) and name.startswith("blocks"):
                    report.replaced[name] = part
                    model.set_submodule(name, Doubled(part, state["bits"]))
            report.sites = tuple(report.replaced)
            if self.fail:
                for name, part in report.replaced.items():
                    model.set_submodule(name, part)
                raise AttachError("cannot")
            return report

    yield
    del registry.METHODS.registered["toy_prune"], registry.METHODS.registered["toy_quant"]


@pytest.fixture
def model(toy):
    return vitarium.create_model("toy_deep", num_classes=3, in_chans=1).eval()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[k], state[k]) for k in own)


def test_apply_reports_and_undo_restores_bit_by_bit(model, capsys):
    before, modules = state_of(model), list(model.modules())
    assert vitarium.apply(model, "toy_prune:share=0.3", "toy_quant") is model
    prune, quant = model.methods
    assert prune.method.share == 0.3
    assert quant.bytes_after < quant.bytes_before == prune.bytes_after
    assert "toy_prune:share=0.3: " in capsys.readouterr().out
    assert not torch.equal(model.state_dict()["stem.weight"], before["stem.weight"])
    vitarium.undo(model)
    assert_same(model, before)
    assert list(model.modules()) == modules
    assert methods_on(model) == []


def test_a_copy_has_its_own_undo(model):
    before = state_of(model)
    twin = copy.deepcopy(vitarium.apply(model, "toy_prune", "toy_quant", quiet=True))
    assert_same(vitarium.undo(twin), before)
    assert len(model.methods) == 2
    assert_same(vitarium.undo(model), before)


def test_order_is_fixed(model):
    with pytest.raises(
        UsageError, match=r"toy_prune \(prune\) comes after toy_quant \(quantize\), .* prune, reduce, adapt, quantize, explain; give"
    ):
        vitarium.apply(model, "toy_quant", "toy_prune", quiet=True)
    vitarium.apply(model, "toy_quant", quiet=True)
    with pytest.raises(UsageError, match="undo the model and apply both in that order"):
        vitarium.apply(model, "toy_prune", quiet=True)
    with pytest.raises(UsageError, match="on the model twice"):
        vitarium.apply(model, "toy_quant", quiet=True)


def test_all_or_none(model):
    before = state_of(model)
    with pytest.raises(AttachError, match="cannot"):
        vitarium.apply(model, "toy_prune", "toy_quant:fail=true", quiet=True)
    assert_same(model, before)
    assert methods_on(model) == []


def test_nothing_to_work_at_is_an_error():
    linear = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(AttachError, match="toy_quant found no module to change in a Sequential"):
        vitarium.apply(linear, "toy_quant", quiet=True)


def test_originals_can_be_let_go(model):
    vitarium.apply(model, "toy_quant", keep_original=False, quiet=True)
    assert not model.methods[0].replaced
    with pytest.raises(UsageError, match="toy_quant cannot be undone: the original weights are gone"):
        vitarium.undo(model)


def test_a_saved_file_rebuilds_structure_and_weights(model, tmp_path):
    vitarium.apply(model, "toy_prune", parse_method("toy_quant:bits=4"), quiet=True)
    vitarium.save(model, tmp_path / "m.safetensors")
    again = vitarium.load(tmp_path / "m.safetensors")
    assert_same(again, state_of(model))
    assert [str(r.method) for r in again.methods] == ["toy_prune", "toy_quant:bits=4"]
    assert again.methods[1].state == {"bits": 4}
    image = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
    with pytest.raises(UsageError, match="cannot be undone"):
        vitarium.undo(again)


def test_text_and_back():
    assert str(parse_method("evit:keep=0.5,blocks=[1, 2],fuse=false")) == "evit:keep=0.5,blocks=[1,2],fuse=false"
    assert parse_method("evit: keep = 0.5").keep == 0.5
    assert build_method("toy_quant", {"calibration": [1]}).options() == {"bits": 5, "fail": False}
    for text in ("toy_quant:bits=9", "toy_quant:bit=3", "toy_quant:bits", "toy_quant:bits=[", "no_such"):
        with pytest.raises(UsageError):
            parse_method(text)


def test_methods_are_found_by_their_systems():
    assert {"evit", "pitome", "tome"} <= set(list_methods())
    assert list(entry_of("pitome").methods) == ["pitome", "tome"]
    assert not entry_of("swin").methods


def test_live_options_only(model):
    vitarium.apply(model, "toy_quant", quiet=True)
    with pytest.raises(UsageError, match=r"cannot change 'bits' while attached \(live options: none\)"):
        model.methods[0].tune(bits=3)
