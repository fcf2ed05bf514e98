"""The application: its commands, its global options, and its handling of errors."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import sys
import tempfile
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vitarium.cli import (
    bench,
    claim,
    compare,
    compress,
    env,
    evaluate,
    export,
    generate,
    index,
    info,
    methods,
    models,
    predict,
    probe,
    push,
    recipes,
    restore,
    search,
    serve,
    systems,
    train,
)
from vitarium.cli.console import err, out, output_failed, pairs, prepare_output, print_json, print_tables
from vitarium.cli.explain import explain as explain_images
from vitarium.cli.interrupts import MESSAGE, settle
from vitarium.errors import UsageError, VitariumError, WriteError, nearest
from vitarium.files import FULL, MODEL_ENDINGS, write_error
from vitarium.texts import printable

SEVERAL = ". Names of one option are separated by commas, as in --models a,b; a path with blanks needs quotes."


class Commands(TyperGroup):
    """Group whose commands end with a result, or with one message on stderr and an exit code (see vitarium.errors)."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().make_context(*arguments, **options)
        except OSError as error:  # of the output of --help or --version
            explain(_of_disk(error))
            raise typer.Exit(2) from None
        except Exception as error:  # an unknown option before the command
            raise _safe(error) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            done = super().invoke(ctx)
            sys.stdout.flush()  # here, where a failure still has a message
            settle()
            return done
        except KeyboardInterrupt as interrupt:  # the message of a training has the step at which it stopped and the command to continue
            settle()
            err().print(str(interrupt) or MESSAGE, style="yellow", markup=False, soft_wrap=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if type(error).__module__.split(".")[0] in ("typer", "click") or isinstance(error, BrokenPipeError):
                raise _safe(error) from None  # typer's exits and its usage errors (exit code 2)
            shown = _of_disk(error)
            if isinstance(shown, WriteError) and hasattr(shown.result, "facts"):  # what was computed is not lost
                with contextlib.suppress(OSError):
                    print_result(shown.result, as_json=ctx.meta.get(AS_JSON, False))
                    sys.stdout.flush()
            output_failed()
            explain(shown, debug=ctx.params.get("debug", False))
            raise typer.Exit(shown.exit_code if isinstance(shown, VitariumError) else 1) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        ctx.meta[AS_JSON] = "--json" in args
        return super().resolve_command(ctx, args)


AS_JSON = "vitarium.cli.json"
"""Key in the context of whether a command was given --json."""


def _of_disk(error: Exception) -> Exception:
    """Return the error of standard output, of a disk, or of a missing permission as one that says what to do; others as they are.

    The files of a result have theirs from `atomic_path`; these are of other files, such as temporary ones.
    """
    if not isinstance(error, OSError) or isinstance(error, VitariumError):
        return error
    if error.filename is None and output_failed():
        reason = os.strerror(error.errno) if error.errno is not None else str(error)
        return WriteError(f"cannot write the output (standard output): {reason}; send it to another place", error.errno, reason)
    if error.errno in (*FULL, errno.EROFS):
        if error.filename is None:
            advice = f"make room on its disk, or choose another place; temporary files are in {tempfile.gettempdir()} (TMPDIR)"
            return WriteError(f"cannot write a file: {error.strerror}; {advice}", error.errno, error.strerror or "")
        return write_error(os.fsdecode(error.filename), error)
    if isinstance(error, PermissionError) and error.filename is not None:
        return UsageError(f"{os.fsdecode(error.filename)}: {error.strerror}; choose another file, or change who may read and write it")
    return error


def print_result(result: Any, *, as_json: bool) -> None:
    """Print a result whose file could not be written."""
    if as_json:
        print_json(result.to_dict())
    else:
        if result.facts_beside_tables or not result.tables():
            out().print(pairs(result.facts()))
        print_tables(result.tables())


def _safe(error: Exception) -> Exception:
    """Return an error of typer with a message that is safe to print: it quotes arguments, which may be names of files of others."""
    if isinstance(message := getattr(error, "message", None), str):
        hint = SEVERAL if message.startswith("Got unexpected extra argument") else ""
        error.message = printable(_helpful(error, message)) + hint  # type: ignore[attr-defined]
    return error


def _helpful(error: Any, message: str) -> str:
    """Return the message of a usage error with what typer does not know: near names of a choice, a model among the images, the list of
    models."""
    param, ctx = getattr(error, "param", None), getattr(error, "ctx", None)
    found = re.fullmatch(r"(?:Value error, )?'(.*)' is not one of (.*?)\.?", message, re.DOTALL)
    if found:
        choices = re.findall(r"'([^']*)'", found[2])
        return f"{found[1]!r} is not one of {found[2]}{nearest(found[1], choices)}"
    models = [str(path) for path in (ctx.params.get("images") if ctx else None) or [] if str(path).endswith(MODEL_ENDINGS)]
    if models and getattr(param, "name", "") == "model":
        return f"{models[0]} is a model, not an image: write --model {models[0]}"
    if type(error).__name__ == "MissingParameter" and getattr(param, "name", "") in ("model", "models"):
        return f"{message}{' ' if message else ''}'vitarium models' lists the names; the file of a trained model will do, too"
    return message


def explain(error: Exception, *, debug: bool = False) -> None:
    """Print the message of an error; for errors of other libraries also the type, and the command that shows the traceback."""
    console = err()
    if debug:
        console.print_exception(show_locals=False)
    name = "" if isinstance(error, VitariumError) else f"{type(error).__name__}: "
    console.print("[bold red]error:[/] ", end="")
    console.print(f"{name}{str(error).strip() or 'no message'}", markup=False, soft_wrap=not console.is_terminal)
    if not debug and not isinstance(error, VitariumError):
        console.print(f"  {shlex.join(['vitarium', '--debug', *sys.argv[1:]])}", style="dim", markup=False, soft_wrap=True)


app = typer.Typer(
    name="vitarium",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 unexpected, 2 usage, 3 data, 4 checkpoint, 5 training stopped, 130 interrupted.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from vitarium import __version__

        typer.echo(f"vitarium {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    """Vision models that compose: which works best on your data and your hardware, and can it be smaller?"""


for command in (
    systems.systems,
    models.models,
    info.info,
    methods.methods,
    recipes.recipes,
    compare.compare,
    train.train,
    evaluate.evaluate,
    probe.probe,
    predict.predict,
    index.index,
    search.search,
    restore.restore,
    generate.generate,
    explain_images,
    compress.compress,
    bench.bench,
    export.export,
    serve.serve,
    push.push,
    claim.claim,
    env.env,
):
    app.command()(command)


def run() -> None:
    """Run the application; see `vitarium.cli.main`."""
    prepare_output()
    app(prog_name="vitarium")
