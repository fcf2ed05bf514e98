"""`vitarium env`: versions, devices and optional packages of this installation."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from vitarium.cli.console import out, pairs, print_json, table

EXTRAS_OF_DEVELOPERS = ("all", "dev", "docs")


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Show versions, devices, threads, optional packages and cache folders of this installation."""
    report = describe()
    if as_json:
        return print_json(report)
    console = out()
    console.print(pairs(report["system"] | report["versions"]))
    devices = table("device", "name", ">memory", title="Devices")
    for row in report["devices"]:
        devices.add_row(row["device"], row["name"], row["memory"] or "")
    console.print(devices)
    extras = table("extra", "state", "~install", title="Extras")
    for name, extra in report["extras"].items():
        state = f"[yellow]needs {', '.join(extra['missing'])}[/]" if extra["missing"] else "[green]installed[/]"
        extras.add_row(name, state, extra["install"].replace("[", r"\[") if extra["missing"] else "")
    console.print(extras)
    console.print(pairs(report["caches"], title="Caches"))


def describe() -> dict[str, Any]:
    """Return the report as plain values."""
    import torch

    from vitarium.cores import core_count

    versions = {
        name: version(name) or "missing" for name in ("vitarium", "torch", "torchvision", "timm", "lightning-fabric", "safetensors")
    }
    return {
        "system": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cores": core_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": versions,
        "devices": devices(),
        "extras": extras(),
        "caches": caches(),
    }


def version(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def devices() -> list[dict[str, str | None]]:
    """Return the CPU and every accelerator that torch supports here."""
    import torch

    found: list[dict[str, str | None]] = [{"device": "cpu", "name": platform.processor() or platform.machine(), "memory": None}]
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        found.append({"device": f"cuda:{i}", "name": card.name, "memory": f"{card.total_memory / 1e9:.0f} GB"})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU", "memory": None})
    return found


def extras() -> dict[str, dict[str, Any]]:
    """Return for each extra its packages, the missing ones, and the command that installs it."""
    needs: dict[str, list[str]] = {}
    for requirement in metadata.requires("vitarium") or []:
        name, _, marker = requirement.partition(";")
        extra = re.search(r"extra == ['\"](.+?)['\"]", marker)
        package = re.match(r"[\w.-]+", name)
        if extra and package and extra[1] not in EXTRAS_OF_DEVELOPERS:
            needs.setdefault(extra[1], []).append(package[0])
    return {
        extra: {
            "packages": packages,
            "missing": [p for p in packages if version(p) is None],
            "install": f"pip install 'vitarium[{extra}]'",
        }
        for extra, packages in sorted(needs.items())
    }


def caches() -> dict[str, str]:
    """Return the folders of downloaded weights and data."""
    import torch
    from huggingface_hub import constants

    return {"hugging face": str(Path(constants.HF_HUB_CACHE)), "torch": torch.hub.get_dir()}
