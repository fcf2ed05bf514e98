"""Test that the Python examples in the guides run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs/guides/data.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_an_example_of_the_guide_runs(number: int):
    exec(compile(BLOCKS[number], f"data.md, example {number}", "exec"), {})


@pytest.mark.parametrize("name", ["runtimes", "first", "evaluate"])
def test_the_examples_of_a_guide_run_one_after_the_other(name: str):
    """Later examples use the names of earlier ones."""
    pytest.importorskip("onnxscript")
    guide = GUIDE.with_name(f"{name}.md")
    scope: dict[str, object] = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)):
        exec(compile(block, f"{name}.md, example {number}", "exec"), scope)
