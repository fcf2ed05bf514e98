"""DCGAN: training, the interface of generators, and errors for unsupported options."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vitarium
from vitarium.cli.app import app
from vitarium.errors import UsageError
from vitarium.generation import Generator
from vitarium.generation.adversarial.dcgan import DCGANLearner, halvings
from vitarium.generation.frechet import FrechetDistance, extractor
from vitarium.generation.grids import HEAD
from vitarium.training import find_learner, fit, load_recipe

run = CliRunner().invoke
SMALL = {"in_chans": 1, "width": 8, "latent_dim": 8}


def learner(*changes: str) -> tuple[DCGANLearner, object, object]:
    recipe = load_recipe("dcgan", ["model_arguments={in_chans: 1, width: 8, latent_dim: 8}", *changes])
    data = vitarium.open_data("digits")
    return find_learner("dcgan").create("dcgan_pico", data, recipe), data, recipe


def distance(model, data) -> float:
    """Fréchet distance of 8x8 grey levels to the held-out digits."""
    metric = FrechetDistance(*extractor("pixels"))
    real = torch.stack([model.preprocessing(data.val[i][0]) for i in range(len(data.val))])
    metric.update(real / 2 + 0.5, real=True)
    metric.update(model.generate(torch.tensor([data.val[i][1] for i in range(len(data.val))])), real=False)
    return float(metric.compute())


def test_it_learns(tmp_path):
    """80 steps of a tiny pair bring the images from 7 to about 1; the recipe's 1,500 steps end at 0.3."""
    made, data, recipe = learner("budget.steps=80", "eval_every=1.0", "schedule={name: constant, warmup: 0.0}", "ema=null")
    before = distance(made.model, data)
    result = fit(made, data, recipe, tmp_path)
    after = distance(made.model, data)
    assert before > 4
    assert after < 0.4 * before
    assert result.metrics["frechet"] < 0.5 * before


def test_the_generator_keeps_the_contract():
    torch.manual_seed(0)
    model = vitarium.create_model("dcgan_pico", num_classes=3, image_size=28, **SMALL)
    assert isinstance(model, Generator)
    images = model.generate(torch.tensor([0, 1, 2, 1]), seed=3)
    assert images.shape == (4, 1, 28, 28)
    assert 0 <= images.min() <= images.max() <= 1
    parts = [model.generate(torch.tensor([label]), seed=3, indices=torch.tensor([i])) for i, label in enumerate((0, 1, 2, 1))]
    torch.testing.assert_close(torch.cat(parts), images, rtol=0, atol=1e-5)
    assert not torch.equal(images[1], images[3])
    assert not torch.equal(model.generate(torch.tensor([0]), seed=4), images[:1])
    inputs = model.example_inputs(2)
    assert model(**inputs).shape == (2, 1, 28, 28)


def test_r1_is_half_gamma_times_the_squared_slope():
    made, _, _ = learner("objective.gamma=2.0")
    image, target = torch.rand(3, 1, 16, 16), torch.tensor([0, 1, 2])
    found = made.regularize({"image": image, "target": target}, "discriminator", "r1")
    slopes = torch.func.vmap(torch.func.grad(lambda x, y: made.discriminator(x[None], y[None])[0]))(image, target)
    torch.testing.assert_close(found, slopes.square().sum((1, 2, 3)).mean())


def test_the_losses_are_logistic():
    made, _, _ = learner()
    batch = {"image": torch.rand(4, 1, 16, 16), "target": torch.arange(4)}
    noise = copy.copy(made.draws)
    noise.restart()
    fake = made.model(noise.normal(torch.arange(4), 8), batch["target"])
    real, score = made.discriminator(batch["image"], batch["target"]), made.discriminator(fake, batch["target"])
    expected = (-torch.sigmoid(real).log()).mean() - (1 - torch.sigmoid(score)).log().mean()
    torch.testing.assert_close(made(batch, "discriminator")["loss"], expected)
    torch.testing.assert_close(made(batch, "generator")["loss"], -torch.sigmoid(score).log().mean())


def test_no_regularizer_without_gamma():
    assert learner("objective.gamma=0")[0].players()["discriminator"].lazy == {}


def test_from_training_to_a_sheet(tmp_path, monkeypatch):
    """`vitarium train`, `evaluate` and `generate`; the file holds the generator alone."""
    monkeypatch.chdir(tmp_path)
    changes = ["budget.steps=3", "log_every=1", "objective.samples=32", "model_arguments={in_chans: 1, width: 8, latent_dim: 8}"]
    arguments = [part for change in changes for part in ("--set", change)]
    trained = run(app, ["train", "dcgan", "--data", "digits", "--out", "run", *arguments])
    assert trained.exit_code == 0, trained.output
    header = (tmp_path / "run" / "log.csv").read_text().splitlines()[0].split(",")
    assert {"discriminator.loss", "discriminator.r1", "generator.loss"} <= set(header)
    made = run(app, ["generate", "run/model.safetensors", "--classes", "0-2", "-n", "2", "-o", "sheet.png", "--json"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["classes"] == "0, 1, 2"
    assert Image.open("sheet.png").size == (3 * 100 - 4, HEAD + 2 * 100 - 4)  # 48 pixels, twice as large, below the names
    assert not any(name.startswith("discriminator") for name in vitarium.load("run/model.safetensors").state_dict())
    refused = run(app, ["generate", "run/model.safetensors", "--guidance", "3"])
    assert refused.exit_code == 2
    assert "in one step without guidance; got guidance=3" in " ".join(refused.output.split())


def test_what_it_cannot_do_is_refused():
    assert [halvings(size) for size in (7, 16, 28, 64)] == [0, 2, 2, 4]
    with pytest.raises(UsageError, match=r"such as 16, 28 or 64; got 30"):
        vitarium.create_model("dcgan_pico", image_size=30)
    model = vitarium.create_model("dcgan_pico", **SMALL)
    with pytest.raises(UsageError, match="classes 0 to 9, got 10"):
        model.generate(torch.tensor([10]))
    with pytest.raises(UsageError, match="got steps=5"):
        model.generate(torch.tensor([0]), steps=5)
    with pytest.raises(UsageError, match="got image_size=32"):
        model.example_inputs(1, 32)
    with pytest.raises(UsageError, match=r"trains dcgan_\* models, got a ResNet"):
        find_learner("dcgan").create("timm/resnet_pico", vitarium.open_data("digits"), load_recipe("dcgan", ["model_arguments={}"]))
