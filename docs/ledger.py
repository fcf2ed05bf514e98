"""The page of the ledger: each claim with its task, calibration, gains and verdict."""

from __future__ import annotations

import html
from typing import Any

ABOUT = """Such an experiment shows whether the mechanism of a paper does what its authors say on a task that needs it, at the size of a
laptop: small models, thousands of images, minutes. It does not repeat the paper: it says nothing about ImageNet, about models of the
paper's size or about training for hundreds of epochs, and a claim that is not held here may hold there. Each comparison names a floor,
which the better arm must reach, and a ceiling, which no arm may reach; outside of them it is inconclusive because it was not calibrated.
The bar of a plot is the 95 % interval of the gain (Student's t), the brown line the gain that was asked for, the dashed line zero."""


def page() -> str:
    """Return the page of all claims' outcomes."""
    from vitarium.claims import read_ledger
    from vitarium.claims.ledger import LEGEND, counts_of

    entries = read_ledger()
    if not entries:
        return "# Ledger\n\nNo claim has been run yet."
    rows = []
    for e in entries:
        cells = [
            f"[`{e.slug}`](systems/{e.slug}.md)",
            e.says,
            f"**{e.word}**",
            _plots(e),
            e.weights or "from scratch",
            f"{e.seconds / 60:.1f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    head = [
        "# Ledger",
        "",
        f"Outcomes of the small experiments on the papers' main claims, held or not: {counts_of(entries)}.",
        "",
        ABOUT,
        "",
        f"{LEGEND[0].upper()}{LEGEND[1:]}.",
        "",
    ]
    table = ["| system | claim | verdict | gains | weights | minutes |", "|---|---|---|---|---|---|", *rows, ""]
    return "\n".join([*head, *table, *(_entry(e) for e in entries)])


def _plots(entry: Any) -> str:
    return " ".join(_interval(c) for c in entry.comparisons)


def _interval(comparison: dict[str, Any]) -> str:
    """Draw the interval of a gain beside the needed one, as inline SVG; "" for values without an interval."""
    interval, needed, margin = comparison.get("interval"), comparison["at_least"], comparison.get("margin")
    if interval is None or comparison.get("exact"):
        return ""
    asked = [needed] if margin is None else [-margin, margin]
    low, high = min(0.0, *asked, interval[0]), max(0.0, *asked, interval[1])
    pad = 0.08 * ((high - low) or 1.0)
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return round(120 * (value - low) / (high - low), 1)

    colour = {"held": "#0f766e", "not held": "#b91c1c"}.get(comparison["verdict"], "#78716c")
    lines = "".join(f'<line x1="{x(a)}" x2="{x(a)}" y1="1" y2="19" stroke="#b45309" stroke-width="2"/>' for a in asked)
    title = html.escape(f"{comparison['says']}: {comparison['gain']:+.3g} [{interval[0]:.3g}, {interval[1]:.3g}]")
    return (
        f'<svg width="120" height="20" role="img" aria-label="{title}"><title>{title}</title>'
        f'<line x1="{x(0)}" x2="{x(0)}" y1="1" y2="19" stroke="#a8a29e" stroke-dasharray="2 2"/>{lines}'
        f'<line x1="{x(interval[0])}" x2="{x(interval[1])}" y1="10" y2="10" stroke="{colour}" stroke-width="4"/>'
        f'<circle cx="{x(comparison["gain"])}" cy="10" r="4" fill="{colour}"/></svg>'
    )


def claim_section(slug: str) -> str:
    from vitarium.claims import read_ledger

    found = [e for e in read_ledger() if e.slug == slug]
    return "\n".join(["## Its claim, measured", "", *(_entry(e, heading=False) for e in found)]) if found else ""


def _entry(entry: Any, *, heading: bool = True) -> str:
    from vitarium.verbs.claim import gain_of, verdict_of

    e = entry
    lines = [f"## {e.slug}", ""] if heading else []
    lines += [f"*{e.says[0].upper()}{e.says[1:]}*: **{e.word}**.", "", e.method, ""]
    lines += [f"Task: {e.task}", ""] if e.task else []
    lines += ["| comparison | method | baseline | range | gain | | verdict |", "|---|---|---|---|---|---|---|"]
    for c in e.comparisons:
        arms = [f"{a['label']}: {a['mean']:.4g} {a['unit']}" if a else "" for a in (c["method"], c["baseline"])]
        within = "exact" if c.get("exact") else "{:g} to {:g}".format(*c["range"]) if c.get("range") else ""
        lines.append(f"| {c['says']} | {arms[0]} | {arms[1]} | {within} | {gain_of(c)} | {_interval(c)} | {verdict_of(c)} |")
    machine = e.machine
    weights = f"Weights: {e.weights}. " if e.weights else ""
    place = f"{machine['processor']}, {machine['cores']} cores; torch {machine['torch']}; commit {e.commit}"
    return "\n".join([*lines, "", f"{weights}{e.seconds / 60:.1f} minutes on {place}.", ""])
