"""Plain English in code, messages and docs: a list of words and openings is rejected.

Checked are comments, docstrings and messages (string literals with a space in them), not identifiers; the prose of Markdown
files, and the comments of recipes.
`python -m tests.test_style PATH...` lists what is wrong in any file or folder, covered or not.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COVERED = [
    "CONTRIBUTING.md",
    "README.md",
    "docs",
    *(f"tests/{room}" for room in ("backbones", "claims", "data", "efficiency", "explanation", "generation", "nn", "ops", "perception")),
    *(f"tests/{room}" for room in ("pretraining", "reports", "robustness")),
    *sorted(f"src/vitarium/{p.name}" for p in (ROOT / "src/vitarium").iterdir()),
]
WORDS = {
    r"\b(told|tells?|telling)\b": "say what happens: returns, raises, prints, distinguishes",
    r"\banew\b": "again",
    r"\bof the house\b": "of this project",
    r"\b(who|whoever) wants\b": "to ...",
    r"\bpictures?\b": "image (a picture is a drawing that the program makes)",
}
OPENINGS = re.compile(r"(Of|What|How|Where|Whether|Who|Whom|Whose|Under what|By what|In which|From what|Which)\b")
"""Docstrings begin with a verb ("Return whether ...") or a noun phrase of the field."""

FSTRING = getattr(tokenize, "FSTRING_MIDDLE", -1)
"""Literal parts of f-strings, which are tokens of their own since Python 3.12."""

DRAWINGS = {
    "CONTRIBUTING.md": r"\*picture\* only for what the program draws",
    "src/vitarium/verbs/generate.py": r'"seconds a picture"',  # a key of the JSON output
}
"""File -> regular expression of the phrases in it that name a drawing, in which "picture" is right, or that users rely on."""


def python_text(source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, text, whether it is a docstring) of the comments, docstrings and messages of a Python file."""
    documented = set()
    for node in ast.walk(ast.parse(source)):
        for statement in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str):
                documented.add(statement.lineno)
                yield statement.lineno, statement.value.value, True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        message = token.type == tokenize.STRING and token.start[0] not in documented
        if token.type == tokenize.COMMENT or ((message or token.type == FSTRING) and " " in token.string):
            yield token.start[0], re.sub(r"\{[^{}]*\}", "{}", token.string), False


def markdown_text(source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, text, False) of the prose of a Markdown file: code blocks, links' targets and images are left out."""
    fenced = False
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, re.sub(r"\]\([^)]*\)|<[^>]*>", "]", line), False


def yaml_text(source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, text, False) of the comments of a YAML file."""
    for number, line in enumerate(source.splitlines(), 1):
        if "#" in line:
            yield number, line.partition("#")[2], False


READERS = {".py": python_text, ".md": markdown_text, ".yaml": yaml_text}


def faults(path: Path) -> list[str]:
    """Return one line for each fault of a file."""
    source, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
    found = []
    for number, text, documents in READERS[path.suffix](source):
        prose = re.sub(r"`[^`]*`|\b[A-Za-z_.]+/[A-Za-z_./]+", "``", text)  # without code and paths
        if documents:
            prose = re.sub(r"(?m)^( *)\w+(, \w+)*:(?= )", r"\1", prose)  # names of arguments and attributes
        if allowed := DRAWINGS.get(name):
            prose = re.sub(allowed, "", prose)
        for pattern, advice in WORDS.items():
            for match in re.finditer(pattern, prose, re.IGNORECASE):
                line = number + prose[: match.start()].count("\n")
                found.append(f"{name}:{line}: {match[0]!r}; better: {advice}")
        if documents and (match := OPENINGS.match(prose.strip())):
            found.append(f"{name}:{number}: begins with {match[0]!r}: {prose.strip().splitlines()[0][:60]!r}; begin with a verb")
    return found


def files_under(paths: list[str]) -> list[Path]:
    """Return the Python, Markdown and YAML files at and under some paths, relative to the repository."""
    found = []
    for path in (ROOT / p for p in paths):
        assert path.exists(), f"{path} is in the list of covered paths and does not exist"
        found += sorted(p for p in (path, *path.rglob("*")) if p.suffix in READERS)
    return found


@pytest.mark.parametrize("path", COVERED)
def test_plain_english(path: str):
    found = [fault for file in files_under([path]) for fault in faults(file)]
    assert not found, "\n".join(found)


def test_the_check_finds_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    file = tmp_path / "a.py"
    file.write_text(
        '"""Of what."""\nx = f"the {y} picture"  # made anew\n'
        'class A:\n    """Return a `picture`.\n\n    Args:\n        picture: it.\n    """\n    picture = "picture"\n'
    )
    assert [fault.partition(";")[0] for fault in faults(file)] == [
        "a.py:1: begins with 'Of': 'Of what.'",
        "a.py:2: 'picture'",
        "a.py:2: 'anew'",
    ]
    (tmp_path / "b.md").write_text("The picture\n```\ntold\n```\n![](picture.png) who wants\n")
    assert [fault.partition(";")[0] for fault in faults(tmp_path / "b.md")] == ["b.md:1: 'picture'", "b.md:5: 'who wants'"]


if __name__ == "__main__":
    everything = sys.argv[1:] or ["src/vitarium", "docs", "README.md", "CONTRIBUTING.md"]
    lines = [fault for file in files_under(everything) for fault in faults(file)]
    print(*lines, sep="\n")
    print(f"{len(lines)} faults")
