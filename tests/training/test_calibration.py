"""The temperature of a classifier: its fit, its measure, and the one place that turns logits into probabilities."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import vitarium
from vitarium.catalog.calibration import calibrated, probabilities, temperature_of
from vitarium.catalog.record import training_of
from vitarium.catalog.saving import change_record
from vitarium.cli.app import app
from vitarium.errors import CheckpointError, DataError, UsageError
from vitarium.training.calibration import BINS, calibration_error, fit_temperature, halves

FIXTURES = Path(__file__).parents[1] / "fixtures"


def drawn(temperature: float, count: int = 20_000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and targets drawn from softmax(logits / temperature): the temperature is the true one."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_true_temperature_is_found(temperature):
    logits, targets = drawn(temperature)
    found = fit_temperature(logits, targets)
    assert found == pytest.approx(temperature, rel=0.05)
    losses = [float(nn.functional.cross_entropy(logits / (found * factor), targets)) for factor in (0.99, 1, 1.01)]
    assert losses[1] == min(losses), "the minimum of the cross entropy"


def test_the_error_is_the_mean_gap_between_confidence_and_accuracy():
    logits, targets = drawn(2.5)
    confidence, predicted = logits.softmax(1).max(1)
    bins = (confidence * BINS).ceil().clamp(1, BINS)
    right = (predicted == targets).double()
    gaps = [(bins == b).double().mean() * abs(confidence[bins == b].mean() - right[bins == b].mean()) for b in bins.unique()]
    assert calibration_error(logits, targets) == pytest.approx(float(sum(gaps)), abs=1e-6)
    assert calibration_error(logits, targets) > 0.1 > 0.02 > calibration_error(logits / 2.5, targets)


def test_halves_depend_on_the_seed_alone():
    first, second = halves(101, 3)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(101))
    assert (len(first), len(second)) == (50, 51)
    assert torch.equal(first, halves(101, 3)[0])
    assert not torch.equal(first, halves(101, 4)[0])


def test_answers_without_a_temperature_are_refused():
    logits = 3 * torch.eye(4, dtype=torch.float64)
    with pytest.raises(DataError, match="every certainty is justified"):
        fit_temperature(logits, torch.arange(4))
    with pytest.raises(DataError, match="no better than chance"):
        fit_temperature(logits, (torch.arange(4) + 1) % 4)


# ---- a model with its file


class Fixed(nn.Module):
    """A classifier of two classes by the brightness of the image, far too sure."""

    num_classes = 2
    labels = ("dark", "light")

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.scale * image.mean((1, 2, 3))
        return torch.stack((-x, x), 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 held-out images of two classes, by brightness, a fifth of them with the other label; and a saved model."""
    place, rng = tmp_path_factory.mktemp("calibration"), np.random.default_rng(0)
    for i in range(240):
        light = i % 2 == 1
        named = light != (i % 10 in (3, 6))
        path = place / "data" / "val" / ("light" if named else "dark") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        level = 30 + 150 * light + rng.integers(0, 40)
        Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(path)
    torch.manual_seed(0)
    model = vitarium.create_model("timm/vit_pico", num_classes=2, image_size=16)
    model.labels = ["dark", "light"]
    vitarium.save(model, place / "model.safetensors")
    return place


@pytest.fixture
def sure(monkeypatch: pytest.MonkeyPatch, folder: Path) -> nn.Module:
    model = Fixed().eval()
    model.preprocessing = vitarium.load(folder / "model.safetensors").preprocessing
    return model


def test_a_model_is_calibrated_in_place(sure: nn.Module, folder: Path):
    image = torch.randn(3, 3, 16, 16)
    logits = sure(image)
    found = vitarium.evaluate(sure, folder / "data", calibrate=True)
    fit = found.calibration
    assert fit is not None
    assert (fit.fitted, fit.measured) == (120, 120)
    assert fit.error_after < 0.1 < fit.error_before
    assert fit.loss_after < fit.loss_before
    assert found.to_dict()["temperature"] == temperature_of(sure) == fit.temperature > 1
    assert torch.equal(sure(image), logits), "the model's own outputs do not change"
    assert torch.allclose(probabilities(sure, logits), (logits / fit.temperature).softmax(1))
    again = vitarium.evaluate(sure, folder / "data")
    assert (found.metrics["loss"], found.metrics["calibration_error"]) == (fit.loss_after, fit.error_after), "not of the fitted half"
    assert again.metrics["accuracy"] == found.metrics["accuracy"]
    assert vitarium.evaluate(sure, folder / "data", remove_calibration=True).metrics["accuracy"] == again.metrics["accuracy"]
    assert calibrated(sure, logits) is logits


def test_the_file_remembers_and_every_probability_follows(folder: Path, tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((folder / "model.safetensors").read_bytes())
    image = folder / "data" / "val" / "dark" / "0.png"
    before = vitarium.predict(image, file)
    change_record(file, temperature=0.25)
    model = vitarium.load(file)  # its hash is right
    assert training_of(model).temperature == 0.25
    old = vitarium.load(folder / "model.safetensors").state_dict()
    assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())

    odds = lambda found: np.log([p["probability"] for p in found.rows[0]["predictions"]])
    ratio = np.diff(odds(vitarium.predict(image, file))) / np.diff(odds(before))
    assert ratio == pytest.approx(4, rel=1e-3), "log-odds are divided by the temperature"
    drawn = vitarium.explain(image, file, tmp_path / "drawn", method="random").rows[0]["prediction"]
    assert drawn["probability"] == pytest.approx(vitarium.predict(image, file).rows[0]["predictions"][0]["probability"], abs=1e-6)
    vitarium.save(vitarium.apply(model, "sparse_prune:amount=0.5", quiet=True), tmp_path / "pruned.safetensors")
    assert training_of(vitarium.load(tmp_path / "pruned.safetensors")).temperature == 0.25, "methods keep it"
    change_record(file, temperature=None)
    assert file.read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.fixture
def uncertain(tmp_path: Path) -> Path:
    """A briefly trained file with its card."""
    changes = ["budget.steps=30", "eval_every=1.0", "ema=null", "num_workers=0"]
    return vitarium.train("pico", "digits", model="timm/vit_pico", changes=changes, out=tmp_path).file


def test_card_and_info_show_the_calibration(uncertain: Path):
    card, call = uncertain.parent / "README.md", ["evaluate", str(uncertain)]
    uncalibrated = card.read_text()
    assert "not calibrated" in uncalibrated
    done = CliRunner().invoke(app, [*call, "--calibrate", "--json"])
    assert done.exit_code == 0, done.output
    fit = training_of(vitarium.load(uncertain)).calibration
    assert (fit.fitted, fit.measured) == (179, 180)
    text = card.read_text()
    row = f"| calibration error | {100 * fit.error_before:.2f} % | {100 * fit.error_after:.2f} % |"
    assert row in text
    assert "not calibrated" not in text
    shown = " ".join(CliRunner().invoke(app, ["info", str(uncertain)]).stdout.split())
    assert f"calibration error {100 * fit.error_before:.2f} % before, {100 * fit.error_after:.2f} % after" in shown
    assert CliRunner().invoke(app, [*call, "--remove-calibration"]).exit_code == 0
    assert card.read_text().partition("values in its tensors")[0] == uncalibrated.partition("values in its tensors")[0]
    assert "calibration error" not in CliRunner().invoke(app, ["info", str(uncertain)]).stdout
    card.write_text("notes of mine")
    done = CliRunner().invoke(app, [*call, "--calibrate"])
    assert done.exit_code == 0
    assert "was edited, so it stays as it is" in " ".join(done.stderr.split())
    assert card.read_text() == "notes of mine"


def test_a_file_without_a_card_gets_none(uncertain: Path):
    (uncertain.parent / "README.md").unlink()
    vitarium.evaluate(uncertain, calibrate=True)
    assert not (uncertain.parent / "README.md").exists()


def test_a_calibration_is_undone_if_measuring_fails(sure: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch):
    import vitarium.verbs.evaluate

    def fail(*_: object, **__: object) -> None:
        raise DataError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(vitarium.verbs.evaluate, "measure", fail)
        with pytest.raises(DataError, match="disk is gone"):
            vitarium.evaluate(sure, folder / "data", calibrate=True)
        assert training_of(sure).temperature is None
        assert training_of(sure).calibration is None


def test_training_drops_it(folder: Path, tmp_path: Path):
    from vitarium.data import open_data
    from vitarium.training import find_learner, fit, load_recipe

    recipe = load_recipe("pico", ["budget.steps=1", "batch_size=4", "eval_every=1.0", "ema=null", "num_workers=0"])
    data = open_data(folder / "data" / "val", val_fraction=0.5)
    learner = find_learner("classification").create("timm/vit_pico", data, recipe)
    training_of(learner.eval_model()).temperature = 2.0
    fit(learner, data, recipe, tmp_path)
    assert training_of(learner.eval_model()).temperature is None


@pytest.mark.parametrize("name", ["saved-0.1.0", "saved-0.1.0-distilled", "saved-0.1.0-head"])
def test_files_of_earlier_versions_take_one(name: str, tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((FIXTURES / f"{name}.safetensors").read_bytes())
    before = None if name.endswith("head") else training_of(vitarium.load(file))
    change_record(file, temperature=1.5)
    if before is not None:
        after = training_of(vitarium.load(file))
        assert after.temperature == 1.5
        assert (after.task, after.learner) == (before.task, before.learner)


def test_a_graph_carries_it(folder: Path):
    import json

    from vitarium.catalog.calling import example_inputs
    from vitarium.efficiency.export import _record

    model = vitarium.load(folder / "model.safetensors")
    record = lambda: json.loads(_record(model, example_inputs(model), 16))
    assert "temperature" not in record()
    training_of(model).temperature = 0.5
    assert record()["temperature"] == 0.5


def test_what_cannot_be_calibrated(folder: Path, tmp_path: Path):
    file, data = folder / "model.safetensors", folder / "data"
    before = file.read_bytes()
    with pytest.raises(UsageError, match="is a name"):
        vitarium.evaluate("swin_pico", data, calibrate=True)
    with pytest.raises(UsageError, match="calibrate the output of compress"):
        vitarium.evaluate(file, data, apply=["sparse_prune"], calibrate=True)
    with pytest.raises(UsageError, match="local engine"):
        vitarium.evaluate(file, data, engine="ray", calibrate=True)
    with pytest.raises(DataError, match="at least 20"):
        vitarium.evaluate(file, data / "val", val_fraction=0.05, split="val", calibrate=True)
    many = vitarium.create_model("timm/vit_pico", num_classes=3, image_size=16)
    training_of(many).task = {"name": "multilabel"}
    with pytest.raises(UsageError, match="task is multilabel"):
        vitarium.evaluate(many, "scenes:length=20", calibrate=True)
    (tmp_path / "other.safetensors").write_bytes(b"not a model of ours")
    with pytest.raises(CheckpointError):
        change_record(tmp_path / "other.safetensors", temperature=2.0)
    assert file.read_bytes() == before


def test_the_command_fits_shows_and_removes(folder: Path, tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((folder / "model.safetensors").read_bytes())
    change_record(file, temperature=3.0)
    shown = CliRunner().invoke(app, ["evaluate", str(file), "--data", str(folder / "data")]).stdout
    assert "temperature" in shown
    assert "3.000" in shown
    removed = CliRunner().invoke(app, ["evaluate", str(file), "--data", str(folder / "data"), "--remove-calibration"])
    assert removed.exit_code == 0
    assert "temperature" not in removed.stdout
    assert temperature_of(vitarium.load(file)) == 1
    both = CliRunner().invoke(app, ["evaluate", str(file), "--data", str(folder / "data"), "--remove-calibration", "--calibrate"])
    assert both.exit_code != 0


def test_a_finished_run_that_is_asked_for_again_keeps_the_temperature(tmp_path: Path):
    asked = dict(changes=["budget.steps=2", "batch_size=8", "image_size=8"], out=tmp_path, accelerator="cpu")
    file = vitarium.train("pico", "digits", **asked).file
    effect = dict(fitted=20, measured=20, error_before=0.2, error_after=0.1, loss_before=0.5, loss_after=0.4)
    change_record(file, temperature=0.5, calibration=effect)
    before = file.read_bytes()
    assert vitarium.train("pico", "digits", **asked).finished_before
    assert file.read_bytes() == before
    file.write_bytes(before[: len(before) // 2])
    vitarium.train("pico", "digits", **asked)
    assert vitarium.load(file).training_record.temperature is None
