"""The command line: `vitarium`. One file per command; heavy libraries are imported when a command runs, not when the help is read."""

from vitarium.cli.app import app, main

__all__ = ["app", "main"]
