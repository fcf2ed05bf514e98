"""Check one system: style, types, import order, its own tests, and its part of the common contracts. `make check SLUG=swin` runs it.

    python -m tests.check SLUG

Each step prints its time; the first one that fails ends the run. The whole suite (`make test`) checks more.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

from vitarium.catalog.index import entry_of
from vitarium.catalog.registry import families, system_module
from vitarium.catalog.systems import find_system
from vitarium.errors import VitariumError

TESTS = Path(__file__).parent
ROOT = TESTS.parent
COMMON = (
    "tests/backbones/test_contract.py",
    "tests/verbs/test_round_trip.py",
    "tests/efficiency/test_combinations.py",
    "tests/test_style.py",
)
"""Tests that run over all systems; those whose parameters name this one are selected."""


def sources_of(slug: str) -> list[str]:
    """Return the source files of a system: its module or package, and its claim."""
    module = system_module(slug)
    spec = importlib.util.find_spec(module) if module else None
    if spec is None or spec.origin is None:
        return []
    place = Path(spec.origin)
    files = sorted(place.parent.rglob("*.py")) if place.name == "__init__.py" else [place]
    claim = ROOT / "src/vitarium/claims" / f"{slug}.py"
    return [str(file) for file in [*files, claim] if file.is_file()]


def tests_of(slug: str) -> list[str]:
    """Return the test files that carry the system's name."""
    return sorted(str(file.relative_to(ROOT)) for file in TESTS.rglob(f"test_{slug}*.py"))


def expression_of(slug: str) -> str:
    """Return a pytest expression for the parameters that name the system's families, learners or slug."""
    entry = entry_of(slug)
    names = {slug, *(family.name for family in families(slug)), *(entry.learners if entry else ())}
    return " or ".join(sorted(names))


def steps(slug: str) -> list[tuple[str, list[str]]]:
    """Return the commands, each with its name."""
    sources, tests, python = sources_of(slug), tests_of(slug), sys.executable
    binaries = Path(python).parent
    options = ["-p", "no:cacheprovider", "-q"]
    found = [
        ("format", [str(binaries / "ruff"), "format", "--check", *sources, *tests]),
        ("style", [str(binaries / "ruff"), "check", *sources, *tests]),
        ("types", [str(binaries / "mypy"), *sources]),
        ("floors", [str(binaries / "lint-imports")]),
        ("own tests", [python, "-m", "pytest", *options, *tests]),
    ]
    common = [file for file in COMMON if (ROOT / file).is_file()]
    return [*found, ("common contracts", [python, "-m", "pytest", *options, *common, "-k", expression_of(slug)])]


def main(slug: str) -> int:
    """Run the steps; return the exit code of the first that fails, else 0."""
    try:
        find_system(slug)
    except VitariumError as error:
        print(error, file=sys.stderr)
        return 2
    if not sources_of(slug):
        print(f"{slug} has no source file yet: see CONTRIBUTING.md", file=sys.stderr)
        return 2
    if not tests_of(slug):
        print(f"{slug} has no test file yet: tests/ROOM/test_{slug}.py", file=sys.stderr)
        return 2
    for name, command in steps(slug):
        began = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT).returncode
        code = 0 if name == "common contracts" and code == 5 else code  # no common test concerns this system
        print(f"{'ok  ' if code == 0 else 'FAIL'} {name:18} {time.perf_counter() - began:5.1f} s", flush=True)
        if code:
            return code
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.check SLUG")
    sys.exit(main(sys.argv[1]))
