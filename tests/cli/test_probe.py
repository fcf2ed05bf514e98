"""Tests of `probe`, and of pretraining followed by fine-tuning on the command line."""

import json
from pathlib import Path

import pytest

import vitarium


@pytest.fixture
def pretrained(run):
    """A masked autoencoder's file after two steps, with a picture of what it makes of held-out pictures."""
    data = "scenes:task=thorax,length=40"
    changes = ["budget.steps=2", "batch_size=8", "image_size=16", "model_arguments.patch_size=4"]
    result = run("train", "thorax_mae_pico", "--data", data, "--out", "pre", *(part for c in changes for part in ("--set", c)))
    assert result.code == 0, result.err
    assert "vitarium probe" in result.out
    assert next(Path("pre/pictures").glob("reconstruction-*.png")).stat().st_size > 1000
    return "pre/model.safetensors"


def test_pretrain_probe_finetune_evaluate_predict(run, pretrained):
    data = "scenes:task=thorax,length=40"
    found = json.loads(run("probe", pretrained, "--data", data, "--task", "multilabel", "--json").out)
    assert found["knn"].keys() == {"auroc", "mean_average_precision"}
    result = run("probe", pretrained, "--data", data, "--uniform", "--neighbours", 3, "-o", "p.json")
    assert result.code == 0, result.err
    for words in ("nearest neighbours", "logistic regression", "accuracy"):
        assert words in result.out
    assert json.loads(Path("p.json").read_text())["val"] == 8
    result = run("evaluate", pretrained, "--data", data)
    assert "explained" in result.out, result.err

    changes = ["budget.steps=2", "batch_size=8", "image_size=16", "model_arguments.patch_size=4"]
    sets = [part for c in changes for part in ("--set", c)]
    result = run("train", "thorax_mae_finetune_pico", "--data", data, "--checkpoint", pretrained, "--out", "fine", *sets)
    assert result.code == 0, result.err
    tuned = vitarium.load("fine/model.safetensors")
    assert tuned.labels == ["Cardiomegaly", "Effusion", "Infiltration", "Nodule"]
    result = run("evaluate", "fine/model.safetensors", "--data", data, "--json")
    report = json.loads(result.out)
    assert len(report["findings"]) == 4
    image, _ = vitarium.open_data(data).val[0]
    image.save("x.png")
    assert "Cardiomegaly" in run("predict", "x.png", "--model", "fine/model.safetensors").out
    assert run("predict", "x.png", "--model", pretrained, "-o", "drawn").code == 0
    assert next(Path("drawn").glob("*.png")).stat().st_size > 100


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (("nowhere.safetensors",), "nowhere.safetensors", 4),
        (("thorax_mae_pico",), "thorax_mae_pico", 2),
        (("timm/vit_pico",), "no pretrained weights", 2),
    ],
)
def test_mistakes(run, arguments, words, code):
    result = run("probe", *arguments)
    assert words in result.err
    assert result.code == code
