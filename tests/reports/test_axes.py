"""Axes and tables of the page, as a browser without a window draws them. Skipped where there is no browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.reports.fixtures import make_comparison, make_images
from vitarium.reports.page import write_report
from vitarium.reports.results import Comparison

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


def drawn(comparison: Comparison) -> str:
    """The page as HTML after its scripts have run."""
    write_report(comparison, make_images(comparison))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--virtual-time-budget=5000"]
    command = [str(CHROMIUM), *options, f"--user-data-dir={comparison.folder / 'browser'}", "--dump-dom", comparison.report.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def labels(page: str, plot: str) -> list[str]:
    """The labels of the vertical axis of a plot."""
    return re.findall(r'<g class="ytick"><text[^>]*>([^<]*)</text>', page.split(f'id="{plot}"')[1].split("</svg>")[0])


def test_ticks_of_almost_equal_scores_differ_and_end_at_100_percent(tmp_path: Path):
    comparison = make_comparison(tmp_path)
    curve = [{"step": step, "accuracy": score} for step, score in ((200, 0.997), (400, 0.9985), (600, 1.0))]
    scores = {0: 1.0, 1: 0.9989}
    trials = [replace(trial, score=scores.get(i, 0.9995), evaluated=1800, history=curve) for i, trial in enumerate(comparison.trials)]
    page = drawn(replace(comparison, trials=trials))
    for plot in ("scatter", "score"):
        shown = labels(page, plot)
        assert len(shown) >= 3, plot
        assert len(set(shown)) == len(shown), plot
        assert max(float(text.rstrip("%")) for text in shown) == 100, plot
    assert {text.rstrip("%") for text in labels(page, "scatter")} & {"99.8", "99.9", "99.85"}


def test_ticks_of_different_scores_have_no_decimals(tmp_path: Path):
    comparison = make_comparison(tmp_path)
    trials = [replace(trial, score=0.3 + 0.1 * i) for i, trial in enumerate(comparison.trials)]
    assert {"40%", "60%", "80%"} <= set(labels(drawn(replace(comparison, trials=trials)), "scatter"))
