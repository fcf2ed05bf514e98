"""The page of a run: its numbers, escaped, in one file that loads nothing."""

from __future__ import annotations

import json
import logging
import re

import pytest

import vitarium
from vitarium.training import load_recipe
from vitarium.training.rate_finder import judged
from vitarium.training.report import MOST_CLASSES, _confusion_rows, frequent_confusions, useful_range, write_rate_page, write_run_report
from vitarium.training.tasks import ConfusionData


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    changes = ["eval_every=2 steps", "stopping={patience: 2}"]
    return vitarium.train("pico", model="timm/resnet_pico", steps=6, changes=changes, out=folder / "r")


def test_the_page_has_curves_confusion_and_mistakes(trained):
    text = trained.page.read_text(encoding="utf-8")
    payload = json.loads(re.search(r'id="results">(.*?)</script>', text, re.DOTALL)[1])
    score, loss = payload["plots"]
    assert score["lines"][0]["y"] == [entry["accuracy"] for entry in trained.fit.history]
    assert [line["name"] for line in loss["lines"]] == ["training", "held out"]
    assert score["marks"] == [{"x": trained.fit.best_step, "text": "kept"}]
    counts = re.findall(r"predicted as \d: (\d+) of", text)
    assert sum(map(int, counts)) == 359
    right = sum(int(n) for a, b, n in re.findall(r'title="(\d) predicted as (\d): (\d+) of', text) if a == b)
    assert right / 359 == pytest.approx(trained.fit.metrics["accuracy"])
    assert text.count('<img src="data:image/png;base64') == 12
    assert not re.search(r'(src|href)="https?:', re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL))
    assert str(trained.to_dict()["page"]).endswith("report.html")


@pytest.mark.parametrize("spike", [99, 40])
def test_one_step_that_diverged_leaves_the_useful_range_of_a_sweep_readable(tmp_path, spike):
    losses = [2.3 - 0.02 * step for step in range(70)] + [0.9 + 0.05 * step for step in range(30)]
    losses[spike] = 900.0
    sweep = judged([10 ** (-5 + 0.05 * step) for step in range(100)], losses)
    low, high = useful_range(sweep)
    assert low < min(losses)
    assert 2.3 < high < 3.0
    text = write_rate_page(tmp_path, "m", "d", sweep, load_recipe("pico"), "vitarium train").read_text(encoding="utf-8")
    assert re.search(r"shows the useful range; \d+ steps? with losses up to 900 lie", text)
    [plot] = json.loads(re.search(r'id="results">(.*?)</script>', text, re.DOTALL)[1])["plots"]
    assert (plot["vertical"], plot["axis"]) == ("loss", "learning rate (optimizer.lr)")
    assert [mark["text"].partition(":")[0] for mark in plot["marks"]] == ["found", "the recipe's"]


def test_the_page_of_a_finished_run_is_kept(trained):
    before = trained.page.stat().st_mtime_ns
    changes = ["eval_every=2 steps", "stopping={patience: 2}"]
    again = vitarium.train("pico", model="timm/resnet_pico", steps=6, changes=changes, out=trained.file.parent)
    assert again.page == trained.page
    assert again.page.stat().st_mtime_ns == before


def test_a_page_that_cannot_be_written_is_a_warning(trained, tmp_path, caplog):
    class Broken(type(trained.task)):
        def extras(self, *_, **__):
            raise RuntimeError("no memory")

    with caplog.at_level(logging.WARNING, "vitarium"):
        data = vitarium.open_data("digits")
        page = write_run_report(tmp_path, "m", trained.model, Broken(), data, vitarium.training.load_recipe("pico"), trained.fit)
    assert page is None
    assert "the model is complete" in caplog.text


def test_cells_are_coloured_by_their_share_of_the_row():
    section = ConfusionData("t", "w", ["a", "b"], [[3, 1], [0, 0]])
    first, second = _confusion_rows(section)
    assert [(cell["count"], cell["kind"], cell["share"], cell["strong"]) for cell in first["cells"]] == [
        (3, "right", 75, True),
        (1, "wrong", 78, False),
    ]
    assert [cell["kind"] for cell in second["cells"]] == ["", ""]


def test_of_many_classes_the_most_frequent_confusions_are_listed():
    count = MOST_CLASSES + 1
    counts = [[9 if t == p else (t % 5 if p == (t + 1) % count else 0) for p in range(count)] for t in range(count)]
    table = frequent_confusions(ConfusionData("t", "w", [f"c{i}" for i in range(count)], counts))
    assert table.rows[0] == ["c4", "c5", "4 of 13"]
    assert len(table.rows) == 20
