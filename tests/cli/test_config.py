"""Tests of `--config` and `--print-config`, on a small test command and on real ones."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import pytest
import typer
import yaml
from typer.testing import CliRunner

from vitarium.cli.app import Commands
from vitarium.cli.config import configurable


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@pytest.fixture
def paint(tmp_path, monkeypatch):
    """paint("--config", file) -> (exit code, what the command got, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    got = {}
    app = typer.Typer(cls=Commands)

    @app.callback()
    def options():
        """A group, as the real one."""

    @app.command()
    @configurable
    def paint(
        wall: Annotated[str, typer.Argument()],
        coats: Annotated[int, typer.Option(min=1)] = 2,
        colour: Annotated[Colour, typer.Option()] = Colour.RED,
        tool_size: Annotated[float | None, typer.Option()] = None,
        where: Annotated[Path | None, typer.Option("--out")] = None,
        note: Annotated[list[str] | None, typer.Option()] = None,
        dry: Annotated[bool, typer.Option("--dry")] = False,
    ):
        got.update(locals())

    def call(*arguments):
        got.clear()
        result = CliRunner().invoke(app, ["paint", *map(str, arguments)])
        return result.exit_code, {k: v for k, v in got.items() if k != "got"}, result.stdout, result.stderr

    return call


def write(text):
    Path("options.yaml").write_text(text, encoding="utf-8")
    return "--config", "options.yaml"


def test_values_come_from_the_file_with_their_types(paint):
    config = write("wall: north\ncoats: 3\ncolour: blue\ntool-size: 4\nout: a b/ü\nnote: [x, y]\ndry: true\n")
    code, got, _, err = paint(*config)
    assert code == 0, err
    assert got == dict(wall="north", coats=3, colour=Colour.BLUE, tool_size=4.0, where=Path("a b/ü"), note=["x", "y"], dry=True)


def test_the_command_line_wins(paint):
    config = write("wall: north\ncoats: 3\ncolour: blue\n")
    got = paint("south", *config, "--coats", 5)[1]
    assert (got["wall"], got["coats"], got["colour"]) == ("south", 5, Colour.BLUE)


def test_a_list_becomes_a_text_with_commas_where_one_value_is_taken(paint):
    assert paint(*write("wall: [north, south]\nnote: [x]\n"))[1]["wall"] == "north,south"


def test_underscores_empty_values_and_empty_files_are_fine(paint):
    assert paint("w", *write("tool_size: 2\ncoats: null\n"))[1]["tool_size"] == 2
    assert paint("w", *write("# nothing\n"))[1]["coats"] == 2


def test_printed_options_read_back_as_the_same(paint):
    _, got, printed, _ = paint("north", "--note", "a: b", "--tool-size", 1.5, "--out", "x", "--print-config")
    assert got == {}  # the command did not run
    assert yaml.safe_load(printed) == dict(wall="north", coats=2, colour="red", out="x", note=["a: b"], dry=False, **{"tool-size": 1.5})
    assert paint(*write(printed), "--print-config")[2] == printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cotes: 3", "did you mean coats"),
        ("zzz: 3", "it takes wall, coats"),
        ("config: x", "no option 'config'"),
        ("coats: many", "--coats"),
        ("coats: 0", "--coats"),
        ("colour: green", "red"),
        ("coats: {a: 1}", "single value"),
        ("note: [[a]]", "single value"),
        ("- a\n- b", "option: value"),
        ("just words", "option: value"),
        ("a: [", "not plain YAML"),
        ("a: &x 1\nb: *x", "anchors"),
        ("a: !!python/object/apply:os.getcwd []", "not plain YAML"),
        ("coats: 1\ncoats: 2", "twice"),
        ("x: " + "a" * 100_000, "at most"),
    ],
)
def test_files_that_cannot_be_used(paint, text, message):
    code, got, _, err = paint("wall", *write(text))
    assert code == 2
    assert got == {}
    assert message in " ".join(err.split())


def test_a_file_that_is_not_there(paint, tmp_path):
    assert paint("wall", "--config", "gone.yaml")[0] == 2
    assert "gone.yaml" in paint("wall", "--config", "gone.yaml")[3]
    assert paint("wall", "--config", tmp_path)[0] == 2
