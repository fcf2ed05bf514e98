"""Learners by name: a custom learner is trained, drawn, saved, evaluated and used like the library's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import vitarium
from vitarium.catalog.record import LearnerRecord, training_of
from vitarium.data import ImageData, open_data
from vitarium.data.loader import stack
from vitarium.errors import UsageError
from vitarium.training import Learner, evaluate, find_learner, fit, learner, list_learners, load_recipe
from vitarium.training.learners import learner_of
from vitarium.training.recipe import Recipe
from vitarium.training.settings import Section


@learner("brightness", task="pretrain")
class Brightness(Learner):
    """Tells how bright a picture is; its samples are pairs, and its batches hold one more entry."""

    class Settings(Section):
        weight: float = 1.0

    primary_metric = ("error", "min")

    def transform(self, augment):
        return Joint(super().transform(None))

    @staticmethod
    def collate(samples):
        batch = stack(samples)
        return {**batch, "count": torch.tensor(len(samples))}

    def loss(self, batch):
        assert batch["count"] == len(batch["image"])
        return {"loss": self.settings.weight * F.mse_loss(self.model(batch["image"])[:, 0], batch["target"])}

    def metrics(self):
        from torchmetrics import MeanMetric, MetricCollection

        return MetricCollection({"error": MeanMetric()})

    def evaluate_batch(self, model, batch, metrics):
        metrics["error"].update((model(batch["image"])[:, 0] - batch["target"]).abs())

    def pictures(self, model, batch):
        return {"guess": Image.new("L", (4, 4), int(100 + model(batch["image"][:1])[0, 0].clamp(0, 1)))}


class Joint:
    joint = True

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, picture, target):
        image = self.transform(picture)
        return image, image.mean()


RECIPE = dict(
    objective={"name": "brightness", "weight": 2.0},
    budget={"steps": 4},
    batch_size=16,
    image_size=16,
    optimizer={"lr": 1e-3},
    eval_every="2 steps",
)


def trained(folder: Path) -> tuple[Learner, ImageData]:
    recipe = Recipe.model_validate(RECIPE)
    data = open_data("digits")
    made = find_learner("brightness").create("timm/resnet_pico", data, recipe)
    assert made.settings.weight == 2.0
    result = fit(made, data, recipe, folder)
    assert set(result.metrics) >= {"error", "train_loss"}
    return made, data


def test_a_learner_of_ones_own_trains_and_draws(tmp_path):
    trained(tmp_path)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["guess-000002.png", "guess-000004.png"]


def test_a_saved_model_is_evaluated_by_the_objective_that_it_was_trained_for(tmp_path):
    made, data = trained(tmp_path)
    model = made.eval_model()
    training_of(model).learner = LearnerRecord(name="brightness", settings={"weight": 2.0})
    vitarium.save(model, tmp_path / "m.safetensors")
    loaded = vitarium.load(tmp_path / "m.safetensors")
    assert training_of(loaded) == training_of(model)
    assert isinstance(learner_of(loaded), Brightness)
    assert learner_of(loaded).settings.weight == 2.0
    assert evaluate(loaded, data.val)["error"] == pytest.approx(evaluate(made, data.val)["error"])


def test_models_without_an_objective_are_classifiers():
    assert learner_of(vitarium.create_model("timm/resnet_pico", num_classes=3)).objective == "classification"
    assert learner_of(vitarium.create_model("convnext_pico", num_classes=3)).objective == "classification"
    assert {"classification", "repa", "dit_routing"} <= set(list_learners())


def test_an_unknown_objective_names_near_ones():
    with pytest.raises(UsageError, match="unknown objective 'clasification'; did you mean classification"):
        find_learner("clasification")
    with pytest.raises(UsageError, match=r"objective.*did you mean brightness"):
        load_recipe("pico", ["objective.name=brightnes"])


def test_an_unknown_setting_of_an_objective_names_near_ones():
    with pytest.raises(UsageError, match="did you mean weight"):
        load_recipe("pico", ["objective.name=brightness", "objective.wieght=1"])


def test_an_objective_that_answers_nothing_says_so():
    made = Brightness(vitarium.create_model("timm/resnet_pico", num_classes=1))
    with pytest.raises(UsageError, match="trained to pretrain has no answer for a single image"):
        made.task.answers(made.model, {})
