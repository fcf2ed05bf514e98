"""Each verb called from Python on small models and data, its result, and its command with the same options."""

from __future__ import annotations

import ast
import base64
import enum
import importlib
import inspect
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitarium
from vitarium.claims import Range
from vitarium.claims.experiment import Claim, Comparison, Measured
from vitarium.errors import DataError, UsageError
from vitarium.verbs.result import Result

CHANGES = ["budget.steps=2", "batch_size=4", "eval_every=1.0", "num_workers=0", "image_size=16"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with small saved models, class folders of images ("data"), and loose images of which one is broken ("images")."""
    folder = tmp_path_factory.mktemp("verbs")
    torch.manual_seed(0)
    classifier = vitarium.create_model("timm/vit_pico", num_classes=2, image_size=16)
    classifier.labels = ["cat", "dog"]
    vitarium.save(classifier, folder / "classifier.safetensors")
    restorer = vitarium.create_model("drct_pico", depths=[1], embed_dim=16)
    vitarium.save(restorer, folder / "restorer.safetensors")
    generator = vitarium.create_model("sit_flow_pico", num_classes=3, embed_dim=16, depth=1, num_heads=2)
    vitarium.save(generator, folder / "generator.safetensors")
    rng = np.random.default_rng(0)
    for i in range(24):
        part, label = "train" if i < 16 else "val", ("cat", "dog")[i % 2]
        path = folder / "data" / part / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(path)
    (folder / "images").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / "images" / f"{i}.png")
    (folder / "images" / "broken.png").write_bytes(b"no image")
    return folder


def checked(result: Any) -> dict[str, Any]:
    """Check the three views of a result and return its dictionary as it is read back from JSON."""
    assert isinstance(result, Result)
    text = repr(result)
    assert text.startswith(f"{type(result).__name__}(")
    assert "\n" not in text
    assert len(text) < 500
    page = result._repr_html_()
    assert page.startswith("<table>")
    assert page.count("<table>") == page.count("</table>") == 1 + len(result.tables())
    assert all(len(row) == len(table.columns) for table in result.tables() for row in table.rows)
    return json.loads(json.dumps(result.to_dict(), allow_nan=False))


# ---- each verb


def test_train_evaluate_predict_compress(files: Path, tmp_path: Path):
    trained = vitarium.train("pico", files / "data", model="timm/vit_pico", changes=CHANGES, out=tmp_path / "run")
    assert trained is not None
    assert checked(trained)["steps"] == 2
    assert trained.file.is_file()
    found = vitarium.evaluate(trained.file, files / "data", output=tmp_path / "metrics.json")
    assert checked(found) == json.loads((tmp_path / "metrics.json").read_text())
    assert found.images == 8
    assert vitarium.evaluate(trained.model, files / "data").metrics["accuracy"] == found.metrics["accuracy"]
    answers = vitarium.predict(files / "images", trained.file)
    assert [("error" in row) for row in checked(answers)["images"]] == [False, False, False, True]
    assert vitarium.predict(files / "images", trained.model).rows == answers.rows
    smaller = vitarium.compress(trained.file, ["tome:r=2"], tmp_path / "small.safetensors", files / "data")
    assert checked(smaller)["after"]["macs"] < smaller.before["macs"]
    assert vitarium.load(smaller.file).methods


def test_train_a_model_that_is_given(files: Path, tmp_path: Path):
    model = vitarium.create_model("timm/vit_pico", num_classes=2, image_size=16)
    before = model.head.weight.clone()
    trained = vitarium.train("pico", files / "data", model=model, changes=CHANGES, out=tmp_path / "run")
    assert trained is not None
    assert vitarium.load(trained.file).labels == ["cat", "dog"]
    assert not torch.equal(model.head.weight, before)
    other = vitarium.create_model("timm/vit_pico", num_classes=5, image_size=16)
    with pytest.raises(DataError, match="the model has 5 classes, the data has 2"):
        vitarium.train("pico", files / "data", model=other, changes=CHANGES, out=tmp_path / "other")
    with pytest.raises(UsageError, match="has its own weights"):
        vitarium.train("pico", files / "data", model=model, pretrained=True, changes=CHANGES, out=tmp_path / "other")


def test_explain(files: Path, tmp_path: Path):
    model = files / "classifier.safetensors"
    found = vitarium.explain(files / "images", model, tmp_path / "why", method=["grad_cam", "random"], target="dog", measure=True)
    values = checked(found)
    assert values == json.loads((tmp_path / "why" / "explanations.json").read_text())
    assert [row["image"].endswith("broken.png") for row in found.broken] == [True]
    assert {row["target"]["label"] for row in found.rows if "error" not in row} == {"dog"}
    assert found._repr_html_().count("<img title=") == 6
    assert set(values["measures"]) == {"grad_cam", "random"}
    same = vitarium.explain(str(files / "images" / "0.png"), vitarium.load(model), tmp_path / "again", target=1)
    assert same.rows[0]["explanations"][0]["peak"] == found.rows[0]["explanations"][0]["peak"]
    assert len(list((tmp_path / "again").glob("*.png"))) == 1


def test_generate(files: Path, tmp_path: Path):
    model = files / "generator.safetensors"
    made = vitarium.generate(model, [0, 2], 2, tmp_path / "sheet.png", steps=2, seed=1)
    assert checked(made)["images"] == 4
    assert made.labels == [0, 2, 0, 2]
    assert made.images.shape == (4, 3, 16, 16)
    assert Image.open(tmp_path / "sheet.png").size == made.sheet().size
    (png,) = re.findall(r"data:image/png;base64,([^']+)", made._repr_html_())
    assert Image.open(io.BytesIO(base64.b64decode(png))).size == made.sheet().size
    seen: list[str] = []
    again = vitarium.generate(
        vitarium.load(model), "0,2", 2, steps=2, seed=1, batch_size=1, options={"sampler": "euler"}, notify=seen.append
    )
    assert again.output is None
    assert torch.allclose(made.images, again.images, atol=1e-5)
    assert seen[-1] == "Generating images: 4 of 4"


def test_restore(files: Path, tmp_path: Path):
    restored = vitarium.restore(files / "images", files / "restorer.safetensors", tmp_path / "out", tile=0)
    assert [("error" in row) for row in checked(restored)["images"]] == [False, False, False, True]
    assert Image.open(tmp_path / "out" / "0.png").size == (48, 40)
    one = vitarium.restore(files / "images" / "0.png", vitarium.load(files / "restorer.safetensors"), tmp_path / "one", tile=0)
    assert Path(one.rows[0]["restored"]).read_bytes() == (tmp_path / "out" / "0.png").read_bytes()


def test_probe(files: Path, tmp_path: Path):
    model = files / "classifier.safetensors"
    found = vitarium.probe(model, files / "data", neighbours=3, output=tmp_path / "probe.json")
    assert checked(found) == json.loads((tmp_path / "probe.json").read_text())
    assert (found.train, found.val) == (16, 8)
    assert vitarium.probe(vitarium.load(model), files / "data", neighbours=3).knn == found.knn
    with pytest.raises(UsageError, match="unknown task 'segment'"):
        vitarium.probe(model, files / "data", task="segment")  # type: ignore[arg-type]


def test_index_and_search(files: Path, tmp_path: Path):
    model, path = files / "classifier.safetensors", tmp_path / "images.index"
    made = vitarium.index(files / "images", model, path)
    assert (made.images, made.read, made.gone) == (3, 3, 0)
    assert checked(made)["broken"][0]["image"].endswith("broken.png")
    assert vitarium.index(files / "images", vitarium.load(model), path).read == 0
    query = files / "images" / "1.png"
    found = vitarium.search(path, query, itself=True, top_k=2, model=model, output=tmp_path / "sheet.png")
    assert checked(found)["images"][0]["found"][0]["image"] == str(query)
    assert found.rows[0]["found"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert Image.open(tmp_path / "sheet.png").width > 100
    assert len(vitarium.search(path, [query], model=vitarium.load(model)).rows[0]["found"]) == 2


def test_bench():
    seen: list[Any] = []
    found = vitarium.bench("timm/vit_pico", kind="inference", batch=1, rounds=3, progress=seen.append)
    assert checked(found)["rows"][0]["model"] == "timm/vit_pico"
    assert seen == found.rows
    assert found.rows[0].ours_ms > 0


def test_export(files: Path, tmp_path: Path):
    found = vitarium.export(files / "classifier.safetensors", tmp_path / "graph.pt2", format="torch-export", batch=2)
    assert checked(found)["image"] == [2, 3, 16, 16]
    assert Path(found.file).stat().st_size == found.bytes
    assert found.error < 1e-4


def test_compare(files: Path, tmp_path: Path):
    events: list[Any] = []
    found = vitarium.compare(
        files / "data", "swin_pic*", steps=1, image_size=16, batch_size=4, out=tmp_path / "run", progress=events.append
    )
    assert checked(found) == json.loads((tmp_path / "run" / "results.json").read_text())
    assert [trial.name for trial in found.trials] == ["swin_pico"]
    assert found.report.is_file()
    assert events[-1].kind == "finished"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the claim of Swin by one that takes no time."""

    def compare() -> list[Comparison]:
        """Compare two measured arms."""
        ours, other = Measured("ours", [3.0, 3.2], "dB"), Measured("other", [1.0, 1.1], "dB")
        return [Comparison("the method is better", ours, other, within=Range(2, 10))]

    monkeypatch.setattr("vitarium.claims.run.find_claim", lambda slug: Claim(slug, "windows matter", 1, compare))


def test_claim(measured: None, tmp_path: Path):
    found = vitarium.claim("swin", out=tmp_path / "ledger", cache=tmp_path / "cache")
    assert checked(found)["entries"][0]["verdict"] == "held"
    assert "swin: held" in repr(found)
    ledger = vitarium.claim(out=tmp_path / "ledger")
    assert [entry.slug for entry in ledger.entries] == ["swin"]
    assert "convnext" in ledger.missing
    assert checked(ledger)["entries"] == found.to_dict()["entries"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: vitarium.explain(f / "images", f / "classifier.safetensors", f / "o", method="gradcam"), UsageError, "grad_cam"),
        (lambda f: vitarium.explain(f / "images", f / "classifier.safetensors", f / "o", method=[]), UsageError, "no method"),
        (
            lambda f: vitarium.explain(f / "images/broken.png", f / "classifier.safetensors", f / "o"),
            DataError,
            "no image could be explained",
        ),
        (lambda f: vitarium.generate(f / "classifier.safetensors"), UsageError, "generates no images"),
        (lambda f: vitarium.generate(f / "generator.safetensors", count=0), UsageError, "count must be at least 1"),
        (lambda f: vitarium.generate(f / "generator.safetensors", options={"seed": 3}), UsageError, "is a separate option"),
        (lambda f: vitarium.generate(f / "generator.safetensors", engine="rya"), UsageError, "did you mean ray"),
        (lambda f: vitarium.restore(f / "images", f / "classifier.safetensors", f / "o"), UsageError, "does not restore images"),
        (lambda f: vitarium.index(f / "images", f / "classifier.safetensors", f / "o", address="auto"), UsageError, "engine='ray'"),
        (lambda f: vitarium.search(f / "none.index", f / "images", top_k=0), UsageError, "top_k must be at least 1"),
        (lambda f: vitarium.search(f / "none.index", f / "images", output="x.txt"), UsageError, "must end in"),
        (lambda f: vitarium.bench("swin_pico", kind="both"), UsageError, "unknown kind 'both'"),
        (lambda f: vitarium.bench("swin_pico", dtype="float8"), UsageError, "unknown dtype 'float8'"),
        (lambda f: vitarium.bench([]), UsageError, "no models to time"),
        (lambda f: vitarium.export(f / "classifier.safetensors", format="onxx"), UsageError, "did you mean onnx"),
        (lambda f: vitarium.export(f / "classifier.safetensors", batch=0), UsageError, "a number from 1 up"),
        (lambda f: vitarium.compare(f / "data", "nothing*"), UsageError, "no model matches"),
        (lambda f: vitarium.compare(f / "data", []), UsageError, "names no model"),
        (lambda f: vitarium.claim("swin", every=True), UsageError, "not both"),
        (lambda f: vitarium.claim("swim"), UsageError, "did you mean swin"),
    ],
)
def test_bad_input_raises_early(files: Path, call: Any, error: type[Exception], message: str):
    with pytest.raises(error) as raised:
        call(files)
    assert message in str(raised.value)
    assert not (files / "o").exists()


# ---- what a command can do, one line of Python can do

PARAMETER = {
    "methods": "apply",
    "out_folder": "out",
    "as_json": None,  # how the command prints
    ("index", "folders"): "images",
    ("train", "precision"): None,  # a change of the recipe: changes=["precision=..."]
    ("train", "find_lr"): None,  # vitarium.find_lr
    ("compress", "report"): None,  # result.to_dict()
    ("serve", "token_file"): "token",  # an argument would be seen in the list of processes
}
"""Option of all commands, or (command, option) -> parameter of the verb; None: the verb has none. All others have one name."""
PYTHON_ONLY = {"notify", "progress", ("claim", "cache")}
OTHER_DEFAULTS = {("generate", "output"), ("explain", "method"), ("compress", "apply")}
"""Parameters whose default on the command line is not that of the verb."""


def skin_of(verb: str) -> dict[str, inspect.Parameter]:
    """Return the options of a command by the names that its verb has for them."""
    command = inspect.unwrap(getattr(importlib.import_module(f"vitarium.cli.{verb}"), verb))
    named = {}
    for name, parameter in inspect.signature(command).parameters.items():
        other = PARAMETER.get((verb, name), PARAMETER.get(name, name))
        if other is not None:
            named[other] = parameter
    return named


def plain(value: Any) -> Any:
    """Return a default as a plain value: lists as tuples, enums as their values."""
    if isinstance(value, list | tuple):
        return tuple(plain(one) for one in value)
    return value.value if isinstance(value, enum.Enum) else value


@pytest.mark.parametrize("verb", vitarium.VERBS)
def test_a_command_and_its_verb_have_the_same_options(verb: str):
    function = getattr(vitarium, verb)
    parameters = inspect.signature(function).parameters
    skin = skin_of(verb)
    assert set(skin) == {name for name in parameters if name not in PYTHON_ONLY and (verb, name) not in PYTHON_ONLY}
    for name, option in skin.items():
        if (verb, name) not in OTHER_DEFAULTS:
            assert plain(option.default) == plain(parameters[name].default), name


@pytest.mark.parametrize("verb", vitarium.VERBS)
def test_a_verb_is_typed_and_documented(verb: str):
    function = getattr(vitarium, verb)
    module = importlib.import_module(f"vitarium.verbs.{verb}")
    assert function is getattr(module, verb)
    signature = inspect.signature(function)
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    name = str(signature.return_annotation).removesuffix(" | None")
    assert issubclass(getattr(module, name), Result)
    text = inspect.getdoc(function) or ""
    assert "Raises:" in text
    documented = text.partition("Args:")[2].partition("Raises:")[0]
    assert not [p for p in signature.parameters if p not in documented]


def python_calls() -> list[str]:
    """Return the calls in the Python column of the table in README.md."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and line.count("|") >= 4]
    return [call for row in rows[1:] for call in re.findall(r"`([^`]+)`", row[-1])]


@pytest.mark.parametrize("call", python_calls())
def test_the_readme_calls_functions_of_the_front_door(call: str):
    parsed = ast.parse(call, mode="eval").body
    assert isinstance(parsed, ast.Call)
    assert isinstance(parsed.func, ast.Attribute)
    assert ast.unparse(parsed.func.value) == "vitarium"
    keywords = {keyword.arg: None for keyword in parsed.keywords if keyword.arg}
    inspect.signature(getattr(vitarium, parsed.func.attr)).bind(*parsed.args, **keywords)


def test_the_readme_names_every_verb():
    named = {call.partition("(")[0].removeprefix("vitarium.") for call in python_calls()}
    assert set(vitarium.VERBS) <= named


@pytest.mark.parametrize(
    ("recipe", "model", "text"),
    [
        ("pico", "dit_pico", "dit_pico is a model for the task generate, and the learner classification trains models for classify"),
        ("sit_flow_pico", "swin_pico", "swin_pico is a model for the task classify, and the learner diffusion"),
        ("pico", "kmax_deeplab_pico", "kmax_deeplab_pico is a model for the task segment"),
        ("kmax_deeplab_pico", "timm/vit_pico", "timm/vit_pico is a model for the task classify"),
    ],
)
def test_a_model_for_another_task_is_refused_before_anything_is_opened(tmp_path, monkeypatch, recipe, model, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=text):
        vitarium.train(recipe, "nowhere/", model=model)
    assert not list(tmp_path.iterdir())


def test_compress_does_not_replace_its_own_model(tmp_path):
    path = tmp_path / "m.safetensors"
    vitarium.save(vitarium.create_model("timm/vit_pico", num_classes=2, image_size=16), path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"is the model itself; choose another file"):
        vitarium.compress(path, ["int8"], path)
    assert path.read_bytes() == before


def test_default_data_that_does_not_fit_is_named(tmp_path):
    model = vitarium.create_model("timm/vit_pico", num_classes=2, image_size=16)
    model.labels = ["cat", "dog"]
    with pytest.raises(DataError, match=r"no data was named, so that digits was opened: .*name yours with --data"):
        vitarium.evaluate(model)
    (tmp_path / "run").mkdir()
    vitarium.save(model, tmp_path / "run" / "model.safetensors")
    with pytest.raises(UsageError, match=r"is a folder; name its file: .*model\.safetensors"):
        vitarium.evaluate(tmp_path / "run")


def test_images_are_paths():
    from PIL import Image

    with pytest.raises(UsageError, match="paths of files and folders, got a Image; save it to a file first"):
        vitarium.predict(Image.new("RGB", (8, 8)), vitarium.create_model("timm/vit_pico", num_classes=2, image_size=16))


def test_a_file_is_trained_further(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["budget.steps=2", "batch_size=8", "eval_every=1.0", "ema=null"]
    first = vitarium.train("pico", "digits", changes=short, out="a")
    again = vitarium.train("pico", "digits", model=first.file, changes=[*short, "optimizer.lr=1e-12"], out="b")
    before, after = (dict(done.model.named_parameters()) for done in (first, again))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert again.model.labels == first.model.labels
    with pytest.raises(UsageError, match="holds its own weights; give --pretrained or --checkpoint only"):
        vitarium.train("pico", "digits", model=first.file, checkpoint="x.pth", changes=short, out="c")
    with pytest.raises(DataError, match=r"for a new head on these weights: --model timm/vit_pico --checkpoint a.model\.safetensors"):
        vitarium.train("pico", "scenes:length=60,image_size=16", model=first.file, changes=short, out="d")
    with pytest.raises(UsageError, match="is a model for the task classify, and the learner diffusion"):
        vitarium.train("sit_flow_pico", "digits", model=first.file, changes=short, out="e")
    saved = vitarium.load(first.file)
    new_head = vitarium.train(
        "pico", "scenes:length=60,image_size=16", model=saved.spec.name, checkpoint=str(first.file), changes=short, out="f"
    )
    assert len(new_head.model.labels) != len(first.model.labels)
