"""Readable forms of numbers, dates and durations."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import Any


def three(value: float) -> str:
    """Return three significant digits, with K, M, G or T from a thousand on: 28288354 -> "28.3 M"."""
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " K")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + suffix
    return f"{value:#.3g}".rstrip(".")


def counted(value: float) -> str:
    """Return three significant digits, written out: 15134.2 -> "15,100"."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else three(value)


def percent(share: float) -> str:
    """Return a share of 1 in percent: 0.973 -> "97.3 %"."""
    return f"{100 * share:.1f} %"


def dated(created: str) -> str:
    """Return the day of an ISO 8601 time: "24 November 2026"."""
    moment = datetime.datetime.fromisoformat(created)
    return f"{moment.day} {moment:%B %Y}"


def lasting(seconds: float) -> str:
    """Return a duration in the largest unit that keeps it readable: 5400 -> "1.5 hours"."""
    if seconds < 0.5:
        return "under 1 second"
    size, unit, digits = (1, "second", 0) if seconds < 90 else (60, "minute", 0) if seconds < 5400 else (3600, "hour", 1)
    amount = f"{seconds / size:.{digits}f}"
    return f"{amount} {unit}" if amount == "1" else f"{amount} {unit}s"


def unbroken(text: str) -> str:
    """Return a text in which no line breaks between a number and its percent sign."""
    return re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", text)


def listed(settings: Mapping[str, Any], prefix: str = "") -> str:
    """Return settings as words, nested ones with both names: {"mixup": {"alpha": 0.8}} -> "mixup alpha: 0.8"."""
    parts = []
    for key, value in settings.items():
        name = f"{prefix}{key}".replace("_", " ")
        match value:
            case {}:
                parts.append(listed(value, f"{name} ") or f"{name}: none")
            case list() | tuple():
                parts.append(f"{name}: {' '.join(map(str, value)) or 'none'}")
            case None | bool():
                parts.append(f"{name}: {'yes' if value else 'no'}" if value is not None else f"{name}: none")
            case _:
                parts.append(f"{name}: {value}")
    return ", ".join(parts)
