"""Fixtures that run commands in the test process."""

from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from vitarium.cli.app import app


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run("models", "--json") in an empty folder -> exit code, stdout and stderr (each on its own, lines unwrapped)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERM", "dumb")

    def call(*arguments):
        result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="vitarium")
        return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr, exception=result.exception)

    return call
