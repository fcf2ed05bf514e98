"""The page: all in one file, nothing fetched, nothing executed that came from outside."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.reports.fixtures import NUMBERS, make_comparison, make_images, make_troubled
from vitarium.reports.data_section import MOST_CLASSES
from vitarium.reports.inspection import Inspection
from vitarium.reports.page import render
from vitarium.reports.results import Comparison


class Elements(HTMLParser):
    """All elements with their attributes, and the text of the page that is not script or style."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.inside = "", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def troubled(tmp_path: Path) -> str:
    comparison = make_troubled(tmp_path)
    return render(comparison, make_images(comparison))


def test_loads_nothing(troubled):
    page = Elements(troubled)
    assert not page.all("a") + page.all("iframe") + page.all("object")
    assert all(a["href"] == "data:," for a in page.all("link"))
    assert all("src" not in a for a in page.all("script"))
    assert all(a["src"].startswith("data:image/png;base64,") for a in page.all("img"))
    assert len(page.all("img")) == 5 + 1  # mistakes, and an image whose label half of the models doubt
    ours = re.sub(r"<script>.*?</script>", "", troubled, flags=re.S)  # plotly's own code names addresses that it never asks
    assert not re.search(r"https?://|url\(|@import", ours)
    assert any("default-src 'none'" in (a.get("content") or "") for a in page.all("meta"))


def test_escapes_what_comes_from_outside(troubled):
    assert "<img src=x" not in troubled
    assert "<script>alert" not in troubled
    assert "IMG_0000<b>" not in troubled
    page = Elements(troubled)
    assert "7 models compared on <img src=x onerror=alert(1)>" in page.text
    data = re.search(r'<script type="application/json" id="results">(.*?)</script>', troubled, re.S)[1]
    assert json.loads(data)["classes"][:3] == ["<script>alert(1)</script>", "</script>", "a & b"]


def test_shows_failures_and_broken_images(troubled):
    text = Elements(troubled).text
    assert "SwinTransformer takes images of at least 32x32 pixels, got 16x16" in text
    assert "3 images could not be read and were left out" in text
    assert "truncated after 2,048 bytes" in text


def test_is_accessible(troubled):
    page = Elements(troubled)
    assert all(a.get("alt") for a in page.all("img"))
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    assert [a for a in page.all("th") if a.get("aria-sort") == "descending"]
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"


def test_shows_the_recommendation_and_all_models(tmp_path):
    comparison = make_comparison(tmp_path)
    text = Elements(render(comparison, make_images(comparison))).text
    assert comparison.recommendation.sentence in text
    assert all(name in text for name in NUMBERS)
    assert "1,437 training images" in text
    assert "600 steps each" in text


def test_without_mistakes_and_with_one_model(tmp_path):
    comparison = make_comparison(tmp_path)
    best = comparison.best
    perfect = type(best)(
        **{**vars(best), "score": 1.0, "extras": {"mistakes": [], "confusion": [[36 * (i == j) for j in range(10)] for i in range(10)]}}
    )
    text = Elements(render(make_comparison(tmp_path, trials=[perfect]), {})).text
    assert "every held-out image was classified correctly" in text
    assert "convnext_pico on digits" in text


def test_mentions_machines_that_differ_and_models_at_a_time(tmp_path):
    comparison = make_comparison(tmp_path)
    plain = Elements(render(comparison, make_images(comparison))).text
    assert "different machines" not in plain
    assert "at a time" not in plain
    trials = [replace(t, device="H200" if i else "EPYC") for i, t in enumerate(comparison.trials)]
    changed = replace(comparison, trials=trials, settings={**comparison.settings, "engine": "ray", "at_a_time": "several"})
    text = Elements(render(changed, make_images(changed))).text
    assert "compare only within one of them. EPYC: swin_pico; H200: convnext_pico, " in text
    assert "Several models ran at a time" in text


def unbeaten(folder: Path, **changes) -> Comparison:
    """A comparison whose models are all worse than a baseline."""
    return make_comparison(folder, inspection=Inspection(baselines=[{"name": "regression", "accuracy": 0.999}]), **changes)


def test_a_model_that_is_not_recommended_is_not_put_forward(tmp_path):
    comparison = unbeaten(tmp_path)
    page = render(comparison, make_images(comparison))
    text = Elements(page).text
    assert text.count("No model is better than regression") == 1
    assert "no model is better than regression" not in text
    box = page.split('id="recommendation"')[1].split("</section>")[0]
    assert comparison.recommendation.sentence.split(" (")[0] in box
    assert "<dl" not in box
    assert "vitarium.load" not in page.split("<script", 1)[0]
    good = render(make_comparison(tmp_path), make_images(comparison)).split('id="recommendation"')[1].split("</section>")[0]
    assert "<dl" in good
    assert "vitarium.load" in good


@pytest.mark.parametrize(
    ("name", "pretrained", "advised"), [("swin_pico", False, False), ("swin_tiny", False, True), ("swin_tiny", True, False)]
)
def test_published_weights_are_advised_for_models_that_have_some(tmp_path, name, pretrained, advised):
    comparison = unbeaten(tmp_path)
    trials = [replace(comparison.trials[0], name=name), *comparison.trials[1:]]
    changed = replace(comparison, trials=trials, settings={**comparison.settings, "pretrained": pretrained})
    assert ("--pretrained" in changed.recommendation.sentence) == advised
    assert not any("--pretrained" in text for text in changed.warnings)


def test_says_what_was_left_out_of_the_data(tmp_path):
    comparison = make_comparison(tmp_path, notes=["digits: 3 files are left out, such as <b>x.heic"])
    text = Elements(page := render(comparison, {})).text
    assert "3 files are left out, such as <b>x.heic." in text
    assert "<b>x.heic" not in page.split("<script", 1)[0]
    assert Comparison.from_dict(comparison.to_dict(), tmp_path).notes == comparison.notes


def test_all_rows_of_the_classes_are_visible_without_an_inner_scroll_bar(tmp_path):
    classes = [f"class {i}" for i in range(MOST_CLASSES + 30)]
    comparison = make_comparison(tmp_path, classes=classes, inspection=Inspection(counts=[[140, 36]] * len(classes)))
    page = render(replace(comparison, trials=[replace(t, extras={"mistakes": [], "confusion": []}) for t in comparison.trials]), {})
    (rule,) = re.findall(r"\.data \.scroll \{[^}]*\}", page)
    assert "height" not in rule
    table = page.split('id="data"')[1].split("</table>")[0]
    assert table.count('<th scope="row"') == MOST_CLASSES + 1


def test_a_percentage_of_a_caption_stays_on_one_line(troubled):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", troubled, re.S)
    shares = [text for text in captions if "%" in text]
    assert shares
    assert all(re.search(r"\d\N{NO-BREAK SPACE}%", text) for text in shares)
