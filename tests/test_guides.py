"""Test that the Python examples in the guides run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDES = Path(__file__).parents[1] / "docs/guides"
LONG = "class Duel"
"""An example of the training guide that is a sketch of a class."""


def examples() -> list[tuple[str, int, str]]:
    found = []
    for name in ("data", "training"):
        blocks = re.findall(r"```python\n(.*?)```", (GUIDES / f"{name}.md").read_text(encoding="utf-8"), re.DOTALL)
        found += [(name, number, block) for number, block in enumerate(blocks) if LONG not in block]
    return found


@pytest.mark.parametrize(("name", "number", "block"), examples())
def test_an_example_of_the_guide_runs(name: str, number: int, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # runs are written to the working folder
    exec(compile(block.replace("budget.steps=500", "budget.steps=20"), f"{name}.md, example {number}", "exec"), {})


@pytest.mark.parametrize("name", ["runtimes", "first", "evaluate"])
def test_the_examples_of_a_guide_run_one_after_the_other(name: str):
    """Later examples use the names of earlier ones."""
    pytest.importorskip("onnxscript")
    scope: dict[str, object] = {}
    text = (GUIDES / f"{name}.md").read_text(encoding="utf-8")
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        exec(compile(block, f"{name}.md, example {number}", "exec"), scope)
