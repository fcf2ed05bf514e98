"""The template of a page, and the data types of its tables and images."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

from vitarium.pages.words import dated, unbroken
from vitarium.version import __version__

if TYPE_CHECKING:
    from PIL import Image

HUES = 8
"""Colours of page.css for items such as models; later items begin again, with dashed lines."""
IMAGE_SIDE = 160
"""Larger images are scaled down to this, pixels."""


@dataclass(frozen=True)
class Column:
    """A column of a sortable table.

    Args:
        label: header.
        unit: below the label.
        first: order of the first click: "ascending" or "descending".
        numeric: sort by number and align to the right; else sort as text.
        sorted: order in which the rows already are by this column; "" for the others.
    """

    label: str
    unit: str = ""
    first: str = "ascending"
    numeric: bool = True
    sorted: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a sortable table.

    Args:
        value: by which it is sorted.
        text: shown.
        note: small print behind it.
        best: whether it is shown in bold, as the best of its column.
    """

    value: Any
    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a sortable table.

    Args:
        name: header of the row.
        cells: one for each column after the first.
        colour: number of its hue, 0 to `HUES` - 1; None: no swatch.
        badges: words beside the name.
        recommended: whether the row is highlighted.
    """

    name: str
    cells: Sequence[Cell]
    colour: int | None = None
    badges: Sequence[str] = field(default_factory=tuple)
    recommended: bool = False


def render_page(
    template: str,
    *,
    kind: str,
    title: str,
    created: str,
    facts: Sequence[str],
    data: Any = None,
    css: str = "",
    js: str = "",
    plots: bool = True,
    **values: Any,
) -> str:
    """Render a page as one HTML file that loads nothing from the network. All values are escaped.

    Args:
        template: text of a Jinja template that extends "page" and fills its block "main"; "parts" holds macros for tables, figures,
            definitions and switches. The filter "unbroken" keeps a number and its percent sign on one line, "command" each option
            of a command.
        kind: what the page shows, such as "comparison"; in the line above the title.
        title: heading and title of the window.
        created: ISO 8601 time.
        facts: short phrases below the title.
        data: JSON value for the scripts, which find it as `results`.
        css, js: style and script of this page alone; the script registers functions that draw plots with `onDraw`.
        plots: include plotly (about 5 MB).
        values: of the template.

    Raises:
        ValueError: data with numbers that are not finite.
    """
    from jinja2 import DictLoader, Environment
    from markupsafe import Markup

    assets = resources.files("vitarium.pages") / "assets"
    skeleton = {name: (assets / f"{name}.html.jinja").read_text(encoding="utf-8") for name in ("page", "parts")}
    environment = Environment(loader=DictLoader({**skeleton, "template": template}), autoescape=True, trim_blocks=False)
    environment.filters["unbroken"] = unbroken
    environment.filters["command"] = command
    code = {f"page_{ending}": (assets / f"page.{ending}").read_text(encoding="utf-8") for ending in ("css", "js")}
    code |= {"css": css, "js": js, "payload": script_json(data), "plotly": _plotly() if plots else ""}
    common = dict(kind=kind, title=title, created=created, date=dated(created), facts=facts, version=__version__)
    return environment.get_template("template").render(**values, **common, **{name: Markup(text) for name, text in code.items()})


def command(text: str) -> Any:
    """Return a command as HTML in which no line breaks inside an option, as a browser would after the hyphens of --model."""
    from markupsafe import Markup, escape

    words = (Markup('<span class="option">{}</span>').format(word) if word.startswith("-") else escape(word) for word in text.split(" "))
    return Markup(" ").join(words)


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def script_json(value: Any) -> str:
    """Return JSON that is safe inside a script element.

    Raises:
        ValueError: numbers that are not finite.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def embed_image(image: Image.Image | None, *, side: int = IMAGE_SIDE) -> dict[str, Any]:
    """Return an image as a PNG inside the page: source, width, height, and whether its pixels are shown unsmoothed; "" for none."""
    if image is None:
        return dict(source="")
    image = image.convert("RGB")
    small = max(image.size) < IMAGE_SIDE // 2
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return dict(source=f"data:image/png;base64,{data}", width=image.width, height=image.height, pixelated=small)
