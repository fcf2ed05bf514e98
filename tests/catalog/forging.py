"""Forged files: records that say something else, under a valid seal."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vitarium.catalog.states import RECORD, SEAL, seal_of


def record_of(path: Path) -> dict[str, Any]:
    """The record of a file, as JSON values."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[RECORD])


def forge(path: Path, **changes: Any) -> None:
    """Change fields of a file's record: what a newer version, or somebody, could have written."""
    forge_text(path, json.dumps({**record_of(path), **changes}))


def forge_text(path: Path, text: str) -> None:
    """Replace a file's record by a text, and seal the file."""
    save_file(load_file(path), path, {"format": "pt", RECORD: text, SEAL: "0" * 64})
    digest, place = seal_of(path)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(digest.encode())
