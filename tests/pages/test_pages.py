"""Pages: values are escaped, nothing is fetched, numbers are readable."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from vitarium.pages import Cell, Column, Row, counted, dated, embed_image, lasting, listed, render_page, three
from vitarium.pages.page import command, script_json
from vitarium.pages.words import unbroken

TEMPLATE = """{% extends "page" %}{% import "parts" as parts %}{% block main %}
<h2 id="all">All</h2>{{ parts.sortable_table(columns, rows, [], "all") }}{{ parts.figures(figures) }}{{ parts.definitions(figures) }}
{{ parts.switch("cost", "Cost", options) }}{% endblock %}"""
HOSTILE = "<img src=x onerror=alert(1)>"


def page(**changes) -> str:
    values = dict(
        kind="claim",
        title=HOSTILE,
        created="2026-11-24T21:40:00+00:00",
        facts=["one", HOSTILE],
        data={"name": "</script><script>alert(1)"},
        js="onDraw(() => results);",
        plots=False,
        columns=[Column("Name", numeric=False), Column("Score", "%", "descending", sorted="descending")],
        rows=[Row(HOSTILE, [Cell(1, "1.0", "± 1", best=True)], badges=["new"]), Row("b", [Cell(0, "0.0")], colour=2, recommended=True)],
        figures=[dict(name=HOSTILE, value="3", unit="ms")],
        options=[dict(key="a", label=HOSTILE), dict(key="b", label="B")],
    )
    return render_page(TEMPLATE, **{**values, **changes})


def test_values_are_escaped_and_nothing_is_loaded():
    html = page()
    assert HOSTILE not in html
    assert html.count("&lt;img src=x") == 8  # title twice, fact, row twice (name and sort key), figure, definition, option
    assert (
        json.loads(re.search(r'<script type="application/json" id="results">(.*?)</script>', html, re.S)[1])["name"]
        == "</script><script>alert(1)"
    )
    assert not re.search(r"https?://|url\(|@import|\ssrc=\"", html)
    assert "default-src 'none'" in html


def test_a_table_says_how_it_is_sorted():
    html = page()
    assert html.count('class="num" aria-sort="descending"') == 1
    assert 'data-first="descending"' in html
    assert html.count('class="swatch"') == 1
    assert html.count('class="recommended"') == 1
    assert html.count('class="num top"') == 1
    assert "24 November 2026" in html


def test_what_is_wider_than_the_window_says_that_it_scrolls():
    text = page(plots=False)
    assert 'for (const box of document.querySelectorAll(".scroll"))' in text
    assert '.wide::before { content: "Scroll to the side' in text
    assert ".more { mask-image" in text


def test_plotly_comes_only_with_plots():
    assert "plotly" not in page().lower().replace("plotly.purge", "")
    assert len(page(plots=True)) > 1_000_000


def test_json_in_a_script_is_finite_and_safe():
    assert script_json({"a": "</script>\u2028"}) == '{"a": "\\u003c/script>\\u2028"}'
    with pytest.raises(ValueError, match="JSON compliant"):
        script_json({"a": float("nan")})


def test_images_are_embedded_small():
    large = embed_image(Image.new("RGBA", (640, 320)))
    assert (large["width"], large["height"], large["pixelated"]) == (160, 80, False)
    assert large["source"].startswith("data:image/png;base64,")
    assert embed_image(Image.new("L", (16, 16)))["pixelated"] is True
    assert embed_image(None) == {"source": ""}


@pytest.mark.parametrize(
    ("value", "text"), [(28288354, "28.3 M"), (999.6, "1.00 K"), (0.6268, "0.627"), (123.4, "123"), (1.5e9, "1.50 G"), (0, "0.00")]
)
def test_three_digits(value, text):
    assert three(value) == text


def test_words():
    assert [counted(v) for v in (15134.2, 99.4)] == ["15,100", "99.4"]
    assert [lasting(s) for s in (12, 600, 9000)] == ["12 seconds", "10 minutes", "2.5 hours"]
    assert [lasting(s) for s in (0.2, 0.9, 1.4, 60, 3600)] == ["under 1 second", "1 second", "1 second", "60 seconds", "60 minutes"]
    assert dated("2026-01-31T23:00:00") == "31 January 2026"
    found = command("a --model <b> -o c-d")
    assert found == 'a <span class="option">--model</span> &lt;b&gt; <span class="option">-o</span> c-d'
    assert unbroken("65 %, 5 of 6 models") == "65\N{NO-BREAK SPACE}%, 5 of 6 models"


def test_settings_are_words():
    objective = {"name": "classification", "label_smoothing": 0.1, "mixup": {"alpha": 0.8, "modes": ["a", "b"]}, "none": {}, "hard": False}
    words = "name: classification, label smoothing: 0.1, mixup alpha: 0.8, mixup modes: a b, none: none, hard: no"
    assert listed(objective) == words
