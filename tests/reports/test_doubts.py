"""Possible wrong labels: the images on which models agree against the label."""

from dataclasses import replace
from pathlib import Path

from PIL import Image

from tests.reports.fixtures import make_comparison
from vitarium.reports.doubts import SHOWN, possible_wrong_labels
from vitarium.reports.page import render


def mistake(index: int, predicted: int = 3, confidence: float = 0.9) -> dict:
    return {"index": index, "image": f"photos/{index}.png", "true": 1, "predicted": predicted, "confidence": confidence}


def compared(folder: Path, *lists: list[dict]):
    plain = make_comparison(folder)
    trials = [replace(t, extras={**t.extras, "mistakes": found}) for t, found in zip(plain.trials, lists, strict=False)]
    return replace(plain, trials=trials)


def test_confident_answers_of_half_of_the_models_are_shown(tmp_path):
    comparison = compared(
        tmp_path,
        [mistake(7), mistake(8), mistake(9, confidence=0.5), mistake(10)],
        [mistake(7, confidence=0.8), mistake(8), mistake(9, confidence=0.5), mistake(10, predicted=4)],
        [mistake(7, confidence=0.7)],
        [],
    )
    section = possible_wrong_labels(comparison)
    assert [(one.index, one.answer, one.truth) for one in section.images] == [(7, "3", "label 1"), (8, "3", "label 1")]
    assert section.images[0].note == "80 %, 3 of 4 models"
    page = render(comparison, {7: Image.new("RGB", (16, 16)), 8: None})
    assert "Possible wrong labels" in page
    assert "80\u00a0%, 3 of 4 models" in page  # no line break before the sign


def test_one_model_and_agreement_of_too_few_are_no_reason(tmp_path):
    assert possible_wrong_labels(compared(tmp_path, [mistake(7)])) is None
    assert possible_wrong_labels(compared(tmp_path, [mistake(7)], [mistake(7)], [], [], [])) is None
    assert "Possible wrong labels" not in render(compared(tmp_path, [mistake(7)]), {})


def test_a_row_is_not_endless(tmp_path):
    many = [mistake(i) for i in range(40)]
    assert len(possible_wrong_labels(compared(tmp_path, many, many)).images) == SHOWN
