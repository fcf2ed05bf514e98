"""Tests of `compare`: options, progress display, and the recommendation."""

import io
import json

import pytest
from rich.console import Console

from tests.reports.fixtures import make_comparison
from vitarium.cli.board import Board
from vitarium.cli.console import clock
from vitarium.errors import DataError, UsageError
from vitarium.reports.events import Event
from vitarium.reports.results import Comparison, Failure, Trial
from vitarium.verbs.compare import chosen

NUMBERS = dict(
    evaluated=360, throughput=2000.0, peak_memory_mb=3.5, params=123_456, macs=2_000_000, bytes=500_000, image_size=16, steps=100
)
LISTS = dict(history=[], bad_files=[{"path": "x/[b].png", "reason": "cut off"}], file="m")


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Put a comparison that is already over in the place of the real one; gives what it was asked for."""
    got = {}

    def compare(data, models, *, progress, **options):
        got.update(options, data=data, models=models)
        for kind in ("started", "step", "measuring", "finished"):
            progress(Event(kind, "swin_pico", 0, 2, step=50, steps=100, fraction=0.5, seconds_left=3.0, loss=0.5, accuracy=0.97))
        progress(Event("failed", "timm/vit_pico", 1, 2, message="out of memory"))
        trials = [Trial("swin_pico", score=0.98, metrics={"accuracy": 0.98}, latency_ms=1.5, seconds=12.0, **NUMBERS, **LISTS)]
        return Comparison(
            tmp_path / "runs", "digits", {"train": 1, "val": 1}, ["a"], {}, {}, {}, "", trials, [Failure("timm/vit_pico", "out of memory")]
        )

    monkeypatch.setattr("vitarium.reports.compare.compare", compare)
    return got


def test_the_options_arrive_and_the_result_is_shown(run, asked):
    result = run("compare", "--data", "photos", "--models", "swin_pico,timm/vit_pico", "--steps", 100, "--out", "here", "--devices", 2)
    assert result.code == 0, result.err
    assert asked["models"] == ["swin_pico", "timm/vit_pico"]
    assert (asked["data"], asked["steps"], asked["epochs"], str(asked["out"]), asked["devices"]) == ("photos", 100, None, "here", 2)
    assert "98.0 %" in result.out
    assert "1.50 ms" in result.out
    assert "timm/vit_pico failed: out of memory" in result.out
    assert "1 images could not be read" in result.out
    assert "x/[b].png" in result.out
    assert "swin_pico reaches 98.0 %" in result.out  # the recommendation
    assert "report.html" in result.out
    assert result.out.strip().endswith("runs/m")  # the recommended model's file


def test_without_models_the_comparison_chooses(run, asked):
    assert run("compare").code == 0
    assert asked["models"] is None


def test_a_log_gets_a_line_a_change(run, asked):
    lines = run("compare").err.strip().splitlines()
    assert lines[0] == "[1/2] swin_pico: starting, step 50, accuracy 97.0 %"
    assert lines[-1] == "[2/2] timm/vit_pico: failed, out of memory"
    assert len(lines) == 5


def test_a_terminal_gets_bars():
    board = Board(["swin_pico", "resnet", "vit"])
    board.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    board(Event("step", "swin_pico", 0, 3, step=50, steps=100, fraction=0.5, seconds_left=75.0, loss=0.5, accuracy=0.9))
    board(Event("kept", "resnet", 1, 3, accuracy=0.8))
    plain = Console(file=io.StringIO(), width=120)
    plain.print(board)
    shown = plain.file.getvalue()
    assert "50/100" in shown
    assert "1:15" in shown
    assert "done before" in shown
    assert "waiting" in shown


def test_times_are_shown_as_clocks():
    assert [clock(s) for s in (0, 75, 3700)] == ["0:00", "1:15", "1:01:40"]


def test_patterns_become_names_once():
    names = chosen("swin_pico, *_pico ,timm/vit_small_patch16_224")
    assert names[0] == "swin_pico"
    assert {"convnext_pico", "timm/vit_pico"} <= set(names)
    assert names[-1] == "timm/vit_small_patch16_224"
    assert len(names) == len(set(names))
    assert "uniformer_video_pico" not in names
    assert chosen("uniformer_video_p*") == ["uniformer_video_pico"]


@pytest.mark.parametrize("text", ["", " , ", "nothing_*"])
def test_models_that_name_nothing(text):
    with pytest.raises(UsageError, match=r"no model"):
        chosen(text)


def test_the_command_to_use_the_model_is_quoted_for_a_shell(tmp_path, capsys):
    from vitarium.cli.compare import show

    show(make_comparison(tmp_path / "my runs"))
    shown = "".join(capsys.readouterr().out.split())
    assert f"vitarium predict IMAGE --model '{tmp_path}/my runs/".replace(" ", "") in shown


def test_names_are_separated_by_commas(run):
    with pytest.raises(UsageError, match=r"separated by commas: --models swin_pico,timm/vit_pico, got 'swin_pico timm/vit_pico'"):
        chosen("swin_pico timm/vit_pico,convnext_pico")
    result = run("compare", "--models", "swin_pico", "timm/vit_pico")
    assert result.code == 2
    assert "separated by commas, as in --models a,b" in " ".join(result.err.replace("│", " ").split())


def test_an_error_of_the_comparison_keeps_its_exit_code(run, monkeypatch):
    def compare(*args, **kwargs):
        raise DataError("photos/ holds no images")

    monkeypatch.setattr("vitarium.reports.compare.compare", compare)
    result = run("compare", "--data", "photos")
    assert result.code == 3
    assert result.err.strip().endswith("error: photos/ holds no images")


def test_options_from_a_file(run, asked, tmp_path):
    (tmp_path / "c.yaml").write_text(json.dumps({"models": ["swin_pico", "convnext_pico"], "epochs": 1.5, "out": "there"}))
    assert run("compare", "--config", "c.yaml").code == 0
    assert asked["models"] == ["swin_pico", "convnext_pico"]
    assert (asked["epochs"], str(asked["out"])) == (1.5, "there")


@pytest.mark.parametrize("arguments", [["--steps", 0], ["--seed", -1], ["--val-fraction", 2], ["--epochs", "x"], ["extra"]])
def test_values_out_of_range(run, arguments):
    assert run("compare", *arguments).code == 2
