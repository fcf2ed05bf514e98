"""The command line: `vitarium`. One file per command; heavy libraries are imported when a command runs, not when the help is read."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the `vitarium` command: from here on SIGINT and SIGTERM end it with exit code 130 and without a traceback."""
    from vitarium.cli.interrupts import interruptible

    with interruptible():  # before anything else is imported, which takes half a second
        from vitarium.cli.app import run

        run()
