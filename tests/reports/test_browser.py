"""The page in a real browser: it draws, switches, sorts, hides, and asks nothing of any network. Skipped where there is no browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reports.fixtures import make_comparison, make_images, make_troubled
from vitarium.reports.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")

TICKS = "document.querySelector('#scatter .xtitle').textContent"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def open_page(browser: Any, path: Path, width: int) -> tuple[Any, list[str]]:
    """The page, and a list that collects whatever is wrong with it."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(("data:", "blob:", path.as_uri())) else None)
    page.goto(path.as_uri())
    page.wait_for_selector("#confusion .heatmaplayer .hm", state="attached")
    return page, wrong


@pytest.mark.parametrize("width", [1280, 390])
def test_draws_switches_sorts_and_fits(browser, tmp_path, width):
    comparison = make_comparison(tmp_path)
    write_report(comparison, make_images(comparison))
    page, wrong = open_page(browser, comparison.report, width)

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 1280:  # every column is visible without scrolling
        assert page.evaluate("[...document.querySelectorAll('.scroll')].every((box) => box.scrollWidth <= box.clientWidth)")
    boxes = "[...document.querySelectorAll('.scroll')]"
    assert page.evaluate(f"{boxes}.every((box) => box.classList.contains('wide') === box.scrollWidth > box.clientWidth + 1)")
    if width == 390:  # the table of numbers is cut, which is shown until its end is reached
        assert page.evaluate(f"{boxes}[0].className") == "scroll wide more"
        page.evaluate(f"{boxes}[0].scrollLeft = 1e6")
        page.wait_for_function(f"!{boxes}[0].classList.contains('more')")
    assert page.locator("#scatter .textpoint").count() == 6
    assert "Latency" in page.evaluate(TICKS)
    page.get_by_text("Memory", exact=True).first.click()
    assert "Peak memory" in page.evaluate(TICKS)

    first = "document.querySelector('tbody.sorted th').dataset.value"
    assert page.evaluate(first) == "convnext_pico"
    page.get_by_role("button", name="Latency").click()
    assert page.evaluate(first) == "timm/resnet_pico"
    page.get_by_role("button", name="Latency").click()
    assert page.evaluate(first) == "swin_pico"
    assert page.locator("[aria-sort=descending]").inner_text().startswith("Latency")

    lines = "document.querySelectorAll('#loss .scatterlayer .trace').length"
    assert page.evaluate(lines) == 6
    page.locator(".chip").first.click()
    assert page.evaluate(lines) == 5
    assert page.locator(".chip").first.get_attribute("aria-pressed") == "false"

    point = page.locator("#scatter .points path.point").last  # a real mouse, so that hovering is tried as well
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#scatter .hovertext")
    assert "MACs" in page.locator("#scatter .hovertext").text_content()
    assert wrong == []
    page.close()


def test_hostile_names_stay_text(browser, tmp_path):
    comparison = make_troubled(tmp_path)
    write_report(comparison, make_images(comparison))
    page, wrong = open_page(browser, comparison.report, 1280)
    assert page.evaluate("document.querySelectorAll('img[src=x], main script').length") == 0
    assert wrong == []
    page.close()
