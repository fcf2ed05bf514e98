"""The command line: `vitarium`. One file per command; heavy libraries are imported when a command runs, not when the help is read."""

from __future__ import annotations

import sys

__all__ = ["main"]

OPENVINO_CONVERTER = "openvino.tools.ovc"
"""Part of OpenVINO that no command uses: it converts models, and loads a telemetry client. `import openvino` imports it if it can, which
doubles the time of that import."""


def main() -> None:
    """Run the `vitarium` command: from here on SIGINT and SIGTERM end it with exit code 130 and without a traceback."""
    from vitarium.cli.interrupts import interruptible

    with interruptible():  # before anything else is imported, which takes half a second
        sys.modules.setdefault(OPENVINO_CONVERTER, None)  # type: ignore[arg-type]  # as missing; this process runs one command only
        from vitarium.cli.app import run

        run()
