"""compare asks the task of the recipe: its data, its metric, its tables and drawings, and which direction is better."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitarium
from tests.reports.fixtures import make_comparison, make_images
from vitarium.errors import TrainingStopped, UsageError
from vitarium.reports.compare import compare
from vitarium.reports.page import render
from vitarium.reports.recommend import pareto_front, recommend
from vitarium.reports.results import Comparison, Trial
from vitarium.training import ClassificationLearner
from vitarium.training.tasks import Metric, find_task
from vitarium.verbs.compare import all_cells, chosen, headers


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitarium.reports.trial.MEASURING_SECONDS", 0.0)
    monkeypatch.setattr("vitarium.reports.trial.MEASURING_BATCH", 2)


def checked(result: Comparison, metric: str) -> tuple[dict[str, Any], str]:
    """Check what holds for every task; return results.json and the page."""
    saved = json.loads((result.folder / "results.json").read_text())
    assert Comparison.from_dict(saved, result.folder) == result
    assert saved["metric"]["name"] == result.metric.name == metric
    for row, trial in zip(saved["models"], result.trials, strict=True):
        assert row["score"] == row[metric] == row["metrics"][metric] == trial.score
        assert all(row[key] > 0 for key in ("evaluated", "latency_ms", "throughput", "peak_memory_mb", "params", "macs", "seconds"))
        assert trial.standard_error is None
    with open(result.folder / "results.csv", encoding="utf-8") as file:
        assert list(next(csv.DictReader(file)))[:2] == ["name", metric]
    assert headers(result)[1] == f">{result.metric.label}"
    assert vitarium.load(result.folder / "best.safetensors").spec.name == result.best.name
    page = result.report.read_text(encoding="utf-8")
    assert f"{result.metric.label} is measured on {result.images['val']} held-out ones" in page
    assert "ccuracy" not in page[page.index("<main>") : page.index("</main>")]
    return saved, page


def test_segmenter(tmp_path):
    result = compare("scenes:length=20", recipe="kmax_deeplab_pico", steps=2, batch_size=4, out=tmp_path / "out")
    saved, page = checked(result, "pq")
    assert saved["task"] == {"name": "segment", "kind": "panoptic"}
    assert result.trials[0].name == "kmax_deeplab_pico"  # the recipe's model
    assert {"miou", "sq", "rq"} <= set(saved["models"][0]["metrics"])
    assert "Panoptic quality by class" in page
    assert "Drawing of segments by kmax_deeplab_pico" in page
    assert all_cells(result)[0][0] == "kmax_deeplab_pico"  # no constant answer


def test_restorer_on_a_folder(tmp_path):
    draw = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.fromarray(draw.integers(0, 255, (48, 40, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
    changed = tmp_path / "drct.yaml"
    changed.write_text(
        "objective: {name: restoration, start: interpolation}\nmodel: drct_pico\nimage_size: 12\nbudget: {steps: 2}\nbatch_size: 4\n"
        "optimizer: {name: adam, lr: 1e-4}\n"
    )
    result = compare(tmp_path / "images", ["drct_pico"], recipe=changed, out=tmp_path / "out")
    saved, page = checked(result, "psnr")
    assert saved["metric"]["unit"] == "dB"
    assert {"ssim", "bicubic_psnr"} <= set(saved["models"][0]["metrics"])
    assert f"reaches PSNR {result.best.score:.4g} dB" in page


def test_multilabel_shows_the_constant_answer_first(tmp_path):
    events: list[Any] = []
    arguments: dict[str, Any] = dict(recipe="thorax_mae_finetune_pico", steps=2, batch_size=8, out=tmp_path / "out")
    result = compare("scenes:task=thorax,length=60", progress=events.append, **arguments)
    _, page = checked(result, "auroc")
    assert result.baseline == {"auroc": 0.5}
    assert all_cells(result)[0][:2] == ["constant answer", "0.5"]
    assert result.best.name == result.recommendation.model == "thorax_mae_pico"
    assert page.index("constant answer") < page.index('data-value="thorax_mae_pico"')
    assert events[-1].score == f"AUROC {result.best.score:.4g}"
    assert events[-1].accuracy is None


def test_the_smallest_loss_is_best(tmp_path):
    result = compare("digits", ["sit_flow_pico", "dit_pico"], recipe=_denoising(tmp_path), out=tmp_path / "out")
    _, page = checked(result, "loss")
    least = min(result.trials, key=lambda t: t.score)
    assert result.best == least
    assert result.recommendation.model == least.name == result.table()[0]["name"]
    assert "The spread between runs is not known" in result.recommendation.sentence
    assert "Down and to the left is better" in page
    assert "Of one call of the model (x, t, labels)" in page


def _denoising(folder: Path) -> Path:
    path = folder / "denoise.yaml"
    path.write_text(
        "objective: {name: diffusion, samples: 0}\nmodel_arguments: {in_chans: 1}\nbudget: {steps: 2}\nbatch_size: 16\n"
        "optimizer: {name: adamw, lr: 1e-3}\n"
    )
    return path


def test_a_score_that_is_not_finite_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(find_task("reconstruct"), "summary", lambda *_: {"loss": float("nan")})
    with pytest.raises(TrainingStopped, match="its loss on the 12 held-out images is missing or not finite"):
        compare("scenes:task=thorax,length=60", recipe="thorax_mae_pico", steps=1, batch_size=8, out=tmp_path / "out")


def test_a_learner_that_measures_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ClassificationLearner, "metrics", lambda self: None)
    with pytest.raises(UsageError, match="the learner classification measures nothing on held-out images"):
        compare("digits", ["timm/vit_pico"], steps=1, out=tmp_path / "out")


def test_patterns_stand_for_models_of_the_recipes_task():
    assert "kmax_deeplab_pico" in chosen("*_pico", "kmax_deeplab_pico")
    assert "swin_pico" not in chosen("*_pico", "kmax_deeplab_pico")
    assert {"sit_flow_pico", "dit_pico"} <= set(chosen("*_pico", "sit_flow_pico"))
    assert "timm/vit_pico" in chosen("*_pico", "distillation_pico")
    with pytest.raises(UsageError, match=r"no model matches 'swin_\*' for the task of the recipe drct_pico"):
        chosen("swin_*", "drct_pico")


def test_direction_decides_recommendation_and_front():
    metric = Metric("frechet", "min", title="Fréchet distance")

    class Model:
        evaluated = 10

        def __init__(self, name: str, score: float, latency_ms: float):
            self.name, self.score, self.latency_ms = name, score, latency_ms

    models = [Model("far", 3.0, 1.0), Model("near", 2.0, 5.0), Model("nearly", 2.001, 1.0)]
    said = recommend(models, metric)
    assert said.model == "near"  # no rule of one standard error
    assert "it has the best Fréchet distance, 2, before nearly with 2.001" in said.sentence
    assert pareto_front([1.0, 5.0, 1.0], [3.0, 2.0, 2.001], metric) == [1, 2]


def test_results_of_earlier_versions_load(tmp_path):
    comparison = make_comparison(tmp_path)
    values = comparison.to_dict()
    for key in ("task", "metric", "baseline"):
        del values[key]
    for row in values["models"]:
        for key in ("score", "metric", "metrics", "inputs"):
            del row[key]
        assert {"accuracy", "loss", "confusion", "mistakes"} <= set(row)
    again = Comparison.from_dict(json.loads(json.dumps(values)), tmp_path)
    assert again == comparison
    assert render(again, make_images(again)) == render(comparison, make_images(comparison))
    assert Trial.from_dict(values["models"][0]).score == values["models"][0]["accuracy"]


def test_the_constant_answer_of_classes_is_shown_but_never_best(tmp_path):
    comparison = make_comparison(tmp_path, baseline={"accuracy": 0.999})
    assert all_cells(comparison)[0][:2] == ["constant answer", "99.9 %"]
    assert comparison.best.name == "convnext_pico"
    page = render(comparison, make_images(comparison))
    assert "Constant answer: the best score without looking at the image" in page
    assert "constant answer" not in render(make_comparison(tmp_path), make_images(comparison))
