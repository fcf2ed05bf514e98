"""Tests of the command line application: public names, error messages and exit codes, import time."""

import os
import subprocess
import sys

import pytest
import typer

from vitarium.cli.app import app
from vitarium.errors import CheckpointError, DataError, TrainingStopped, UsageError

# The names that scripts of users rely on. Change them on purpose, and tell it in the changelog.
SURFACE = {
    "systems": "--room --status --json",
    "models": "pattern --room --fits --macs --image-size --measure --json",
    "info": "model --image-size --measure --json",
    "methods": "model --family --training --options --json",
    "recipes": "name --task --json",
    "compare": "--data --models --pretrained --recipe --steps --epochs --minutes --image-size --batch-size --val-fraction --seed --out "
    "--devices --num-nodes --strategy --accelerator --engine --address --jobs --runtime --config --print-config",
    "train": "recipe --data --model --pretrained --checkpoint --epochs --steps --lr --batch-size --image-size --find-lr --set --apply "
    "--log --val-fraction --out --trained-only --precision --devices "
    "--num-nodes --strategy --accelerator --config --print-config",
    "evaluate": "model --data --checkpoint --apply --corruptions --calibrate --remove-calibration --split --val-fraction --seed "
    "--batch-size --device --runtime --output --engine --address --jobs --json --config --print-config",
    "predict": "images --model --checkpoint --apply --top-k --batch-size --device --runtime --output --engine --address --jobs --json",
    "index": "folders --model --output --checkpoint --batch-size --device --runtime --engine --address --jobs --json --config "
    "--print-config",
    "search": "index images --top-k --model --checkpoint --itself --batch-size --device --runtime --output --json --config --print-config",
    "explain": "images --model --output --method --target --measure --checkpoint --apply --batch-size --device --json",
    "restore": "images --model --output --checkpoint --tile --overlap --ensemble --device --json --config --print-config",
    "compress": "model --apply --output --data --checkpoint --val-fraction --seed --batch-size --batch --compile --compile-limit "
    "--device --report --json --config --print-config",
    "generate": "model --classes --count --output --steps --guidance --seed --set --image --mask --checkpoint --apply --batch-size "
    "--device --engine --address --jobs --json --config --print-config",
    "bench": "models --peers --kind --runtime --batch --image-size --dtype --device --rounds --threads --compile-limit --json "
    "--config --print-config",
    "probe": "model --data --task --checkpoint --image-size --neighbours --uniform --val-fraction --seed --batch-size --device --runtime "
    "--output --json --config --print-config",
    "claim": "slugs --all --engine --address --jobs --out --json",
    "serve": "model --checkpoint --apply --device --runtime --host --port --token-file --top-k --batch-size --max-wait --max-queue "
    "--limit-mb --limit-megapixels --timeout",
    "push": "file repository --private --license --message --output --json",
    "export": "model --checkpoint --format --output --image-size --batch --tolerance",
    "env": "--json",
}
GLOBAL = "--debug --version --install-completion --show-completion"


def words(command):
    """Arguments by name, options by their first long name."""
    return " ".join(next((o for o in p.opts if o.startswith("--")), p.name) for p in command.params)


def test_the_public_surface_changes_only_on_purpose():
    group = typer.main.get_command(app)
    assert words(group) == GLOBAL
    assert {name: words(command) for name, command in group.commands.items()} == SURFACE


def test_every_option_has_a_help_text():
    group = typer.main.get_command(app)
    silent = [(name, p.name) for name, c in group.commands.items() for p in c.params if not getattr(p, "help", None)]
    assert not silent


@pytest.mark.parametrize("command", [None, *SURFACE])
def test_help_shows(run, command):
    result = run(*([command] if command else []), "--help")
    assert result.code == 0
    assert "Usage: vitarium" in result.out


def test_help_imports_nothing_heavy():
    heavy = ("torch", "timm", "numpy", "sklearn", "torchvision", "plotly", "lightning_fabric", "pydantic")
    code = (
        "import sys; from vitarium.cli.app import app\n"
        "try: app(['--help'])\n"
        f"except SystemExit as e: print('LOADED', [m for m in {heavy!r} if m in sys.modules], e.code)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip().endswith("LOADED [] 0")


def test_version(run):
    from vitarium import __version__

    assert run("--version").out == f"vitarium {__version__}\n"


def test_unknown_commands_and_options_are_usage_errors_with_near_names(run):
    assert run("modles").code == 2
    assert "models" in run("modles").err
    assert run("models", "--jsn").code == 2
    assert "--json" in run("models", "--jsn").err


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UsageError("use it so"), 2, "error: use it so"),
        (DataError("a [bold] folder"), 3, "error: a [bold] folder"),  # what looks like markup is printed as it is
        (CheckpointError("cut off"), 4, "error: cut off"),
        (TrainingStopped("not finite"), 5, "error: not finite"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (OSError(28, "No space left on device", "/tmp/x"), 2, "cannot write /tmp/x: No space left on device; "),
        (PermissionError(13, "Permission denied", "secret.png"), 2, "error: secret.png: Permission denied; choose another file"),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("interrupted at step 3"), 130, "interrupted at step 3"),
    ],
)
def test_every_error_ends_in_one_message_and_its_exit_code(run, monkeypatch, error, code, text):
    monkeypatch.setattr("vitarium.cli.env.describe", failing(error))
    result = run("env")
    assert result.code == code
    assert text in result.err
    assert "Traceback" not in result.err + result.out
    assert not result.out
    assert ("vitarium --debug" in result.err) == (code == 1)


def test_debug_shows_the_traceback_and_keeps_the_exit_code(run, monkeypatch):
    monkeypatch.setattr("vitarium.cli.env.describe", failing(DataError("none")))
    result = run("--debug", "env")
    assert result.code == 3
    assert "Traceback" in result.err


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_closed_pipe_is_quiet():
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m vitarium --help | true"], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "swin_pico"],
        ["info", "swin_pico", "--json"],
        ["systems"],
        ["systems", "--json"],
        ["env"],
        ["--version"],
        ["info", "--help"],
    ],
)
def test_an_output_that_cannot_be_written_is_named(arguments):
    command = [sys.executable, "-c", "from vitarium.cli import main; main()", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: cannot write the output (standard output): No space left on device; send it to another place\n"


@pytest.mark.parametrize("command", ["info", "evaluate", "bench"])
def test_a_missing_model_points_to_the_list(run, command):
    result = run(command)
    assert result.code == 2
    assert "'vitarium models' lists the names" in result.err
