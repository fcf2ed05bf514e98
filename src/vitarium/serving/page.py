"""The page of an image drop: one file that loads nothing but answers from its own server."""

from __future__ import annotations

import base64
import datetime
import hashlib
import re
from importlib import resources

from vitarium.pages import render_page
from vitarium.serving.state import State


def page_of(state: State) -> tuple[str, str]:
    """Return the page and its Content-Security-Policy, which names its scripts and styles by hash.

    The page holds nothing about the model but its limits: it fetches /info, which may need the token.
    """
    assets = resources.files("vitarium.serving") / "assets"
    template, css, js = ((assets / f"drop.{ending}").read_text(encoding="utf-8") for ending in ("html.jinja", "css", "js"))
    html = render_page(
        template,
        kind="server",
        title="Drop an image",
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        facts=[],
        data={"megabytes": state.limits.limit_mb, "token": state.token is not None},
        css=css,
        js=js,
        plots=False,
    )
    scripts, styles = (hashes(html, tag) for tag in ("script", "style"))
    own = "img-src 'self' data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    return html, f"default-src 'none'; script-src {scripts}; style-src {styles}; {own}"


def hashes(html: str, tag: str) -> str:
    """Return the sources of a policy that allow the inline elements of a page."""
    contents = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in contents)
