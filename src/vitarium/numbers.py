"""Numbers as readable text."""

from __future__ import annotations


def short(value: float | None) -> str:
    """Return three significant digits and a suffix: 28288354 -> "28.3 M"; "-" for None."""
    if value is None:
        return "-"
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " K")):
        if abs(value) >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.{max(0, 2 - len(str(int(abs(scaled)))) + 1)}f}{suffix}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """Return a duration as text: 75 -> "1:15"; 3700 -> "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
