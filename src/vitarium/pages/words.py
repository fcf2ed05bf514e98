"""Readable forms of numbers, dates and durations."""

from __future__ import annotations

import datetime


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
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
