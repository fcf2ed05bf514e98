"""Every command, fed file names, labels and arguments with escape sequences: none of them reaches the terminal."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import typer
from PIL import Image

import vitarium
from vitarium.cli.app import app

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="file names of POSIX")

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m"
MARKUP = "[/bold][red]"
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


def assert_harmless(*texts: str) -> None:
    for text in texts:
        assert not [c for c in text if c != "\n" and (c < " " or "\x7f" <= c <= "\x9f")], repr(text)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A classifier with hostile labels, and a folder of its two classes with hostile names, among them a broken file and, on file systems
    that take it, a name that is not UTF-8."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    labels = [f"a{EVIL}", f"b{MARKUP}"]
    model = vitarium.create_model("timm/vit_pico", num_classes=2, image_size=16).eval()
    model.labels = labels
    vitarium.save(model, folder / f"model{EVIL}.safetensors")
    for label, colour in zip(labels, ("red", "blue"), strict=True):
        (folder / "data" / label.replace("/", "")).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 20), colour).save(folder / "data" / label.replace("/", "") / f"{i}{EVIL}.png")
    if sys.platform == "linux":
        Image.new("RGB", (20, 20), "red").save(os.fsencode(folder / "data" / labels[0]) + b"/caf\xe9.png", format="png")
    (folder / "data" / labels[0] / f"x{EVIL}{MARKUP.replace('/', '')}.png").write_bytes(EVIL.encode())
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_and_option(run, command):
    """Wrong values of all parameters that take text, which messages quote."""
    found = typer.main.get_command(app).commands[command]
    options = [next((name for name in p.opts if name.startswith("--")), "") for p in found.params]
    required = [f"absent{EVIL}" for p in found.params if p.param_type_name == "argument"]
    first = ["--models", f"absent{EVIL}"] if "--models" in options else []  # otherwise defaults would be trained
    for given in ([f"--{EVIL}"], *([name, EVIL] for name in options if name)):
        result = run(command, *required, *first, *given)
        assert_harmless(result.out, result.err)


MODEL, DATA = f"model{EVIL}.safetensors", "data"
WORKING = [
    ("info", MODEL),
    ("info", MODEL, "--json"),
    ("predict", DATA, "--model", MODEL),
    ("predict", DATA, "--model", MODEL, "--json"),
    ("predict", DATA, "--model", MODEL, "--output", f"out{EVIL}.csv"),
    ("predict", DATA, "--model", MODEL, "--output", "answers"),
    ("explain", DATA, "--model", MODEL, "--output", f"why{EVIL}"),
    ("index", DATA, "--model", MODEL, "--output", f"out{EVIL}.index"),
    ("search", f"out{EVIL}.index", DATA, "--output", "sheet.png"),
    ("search", f"out{EVIL}.index", DATA, "--output", "found.json", "--json"),
    ("export", MODEL, "--format", "torch-export"),
    ("restore", DATA, "--model", MODEL, "--output", "restored"),
    ("generate", MODEL),
]


def test_commands_that_work_on_hostile_files(run, home, monkeypatch):
    monkeypatch.chdir(home)
    for arguments in WORKING:
        result = run(*arguments)
        assert_harmless(result.out, result.err)
        assert result.code == (2 if arguments[0] in ("restore", "generate") else 0), (arguments, result.err, result.exception)
    assert (home / f"out{EVIL}.csv").read_text(encoding="utf-8").count("\n") == 11
