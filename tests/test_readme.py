"""Every command of the README and the guides: those of the README's table run, on small models and images; the others are parsed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

import vitarium
from vitarium.cli.app import app
from vitarium.cli.app import app as application

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

SMALLER = [
    ("swin_tiny_patch4_window7_224.pth", "swin_pico.pth"),
    ("swin_tiny", "swin_pico"),
    ("convnext_tiny", "convnext_pico"),
    ("timm/vit_small_patch16_224", "timm/vit_pico"),
    ("timm/deit_small_patch16_224", "timm/vit_pico"),
    ("--steps 2000", "--steps 2"),
    ("train thorax_mae ", "train thorax_mae_pico "),
    ("train kmax_deeplab ", "train kmax_deeplab_pico "),
    ("train repa ", "train repa_pico "),
    ("coco/", "scenes:length=24"),
    ("IMAGES", "photos"),
]
"""Text of the README -> the same with smaller models and data."""
STEPS = "budget.steps=2 batch_size=4 image_size=16 num_workers=0 precision=32-true eval_every=1.0"
SETTINGS = {"deit": STEPS, "thorax_mae_pico": STEPS, "kmax_deeplab_pico": STEPS.replace("16", "32") + " objective.samples=16"}
SETTINGS["pico"] = "image_size=16 num_workers=0 precision=32-true"
SETTINGS["repa_pico"] = STEPS + " objective.encoders=[CLASSIFIER] objective.samples=4 objective.steps=2"
PARSED = ("bench", "claim", "push", "serve")
"""Commands that take minutes even on small models, do not end, or need a network: their lines are parsed, and other tests run them."""
RESTORED = "restore"


def table_rows() -> list[list[str]]:
    """The commands of each row of the README's table."""
    rows = [line.split("|")[2] for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [found for row in rows if (found := [c for c in re.findall(r"`([^`]*)`", row) if c.startswith("vitarium ")])]


def parse(line: str) -> None:
    """Check a command line without running it: command, options, kinds of values, required arguments."""
    group = typer.main.get_command(application)
    name, *arguments = shlex.split(line)[1:]
    while name in ("--debug",):
        name, *arguments = arguments
    command = group.get_command(None, name)
    assert command is not None, f"no command {name!r} in {line!r}"
    command.make_context(name, arguments)


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> dict[str, str]:
    """A folder with what the README's lines name."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    image = lambda: Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    for folder in ("photos/cat", "photos/dog", "images"):
        Path(folder).mkdir(parents=True)
        for i in range(60):
            image().save(f"{folder}/{i}.png")
    for name in ("cat.jpg", "street.jpg", "old.png"):
        image().save(name)
    torch.manual_seed(0)
    model = vitarium.create_model("timm/vit_pico", num_classes=2, image_size=16)
    model.labels = ["cat", "dog"]
    vitarium.save(model, "classifier.safetensors")
    vitarium.save(vitarium.create_model("drct_pico"), "restorer.safetensors")
    torch.save(vitarium.create_model("swin_pico", num_classes=1000).state_dict(), "swin_pico.pth")
    return {"FILE": "classifier.safetensors", "CLASSIFIER": "classifier.safetensors"}


def test_the_readmes_table_runs(workspace):
    from typer.testing import CliRunner

    trained = None
    for row in table_rows():
        here = None
        for line in row:
            parse(line)
            small = line
            for text, smaller in SMALLER:
                small = small.replace(text, smaller)
            command = shlex.split(small)[1]
            if command in PARSED or "hf:owner/name" in small:
                parse(small)
                continue
            file = "restorer.safetensors" if command == RESTORED else here or trained or workspace["FILE"]
            arguments = [file if part == "FILE" else part for part in shlex.split(small)[1:]]
            if command == "train":
                here = f"runs/{arguments[1]}/model.safetensors"
                changes = SETTINGS[arguments[1]].replace("CLASSIFIER", workspace["CLASSIFIER"]).split()
                arguments += ["--out", f"runs/{arguments[1]}", *(part for change in changes for part in ("--set", change))]
            result = CliRunner().invoke(app, arguments, prog_name="vitarium")
            assert result.exit_code == 0, f"{line}\n{' '.join(arguments)}\n{result.stderr}"
            trained = trained or here


@pytest.mark.parametrize("name", ["swin_pico", "convnext_pico", "timm/vit_pico"])
def test_the_readmes_compression_runs_on_each_of_its_models(name, workspace, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.setattr("vitarium.verbs.compress.ROUNDS", 1)
    monkeypatch.setattr("vitarium.verbs.compress.SECONDS", 0.0)
    monkeypatch.setattr("vitarium.verbs.compress.slower", lambda *_: [])
    (line,) = [line for row in table_rows() for line in row if line.startswith("vitarium compress ")]
    model = vitarium.create_model(name, num_classes=2, image_size=16)
    model.labels = ["cat", "dog"]
    vitarium.save(model, "m.safetensors")
    result = CliRunner().invoke(app, ["m.safetensors" if part == "FILE" else part for part in shlex.split(line)[1:]], prog_name="vitarium")
    assert result.exit_code == 0, result.stderr


def commands_of(path: Path) -> list[str]:
    """The command lines in the code blocks of a Markdown file."""
    found, fenced = [], False
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced and re.match(r"\s*(\$ )?vitarium \S", line):
            command = line.strip().removeprefix("$ ").split("  #")[0]
            if " | " not in command and "..." not in command:
                found.append(command)
    return found


@pytest.mark.parametrize("path", [path for path in GUIDES if commands_of(path)], ids=lambda path: path.stem)
def test_the_commands_of_the_guides_are_valid(path: Path):
    for line in commands_of(path):
        try:
            parse(line)
        except typer.Exit:
            pass  # --help and --version leave here
        except Exception as error:
            raise AssertionError(f"{path.name}: {line}\n{error}") from error
