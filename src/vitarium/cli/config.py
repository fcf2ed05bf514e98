"""`--config` and `--print-config`: a command's options from a YAML file, and back."""

from __future__ import annotations

import enum
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from vitarium.errors import UsageError, nearest

Command = TypeVar("Command", bound=Callable[..., Any])
SIZE_LIMIT = 1_000_000  # bytes; a file of options is small, and a large one is something else
OWN = ("config", "print_config", "help")


def configurable(command: Command) -> Command:
    """Give a command `--config FILE` (options from YAML; the command line wins) and `--print-config` (show them and stop)."""

    @functools.wraps(command)
    def wrapper(ctx: typer.Context, config: Path | None, print_config: bool, **options: Any) -> Any:
        if print_config:
            sys.stdout.write(_to_yaml(ctx))
            return None
        return command(**options)

    own = {
        "ctx": typer.Context,
        "config": Annotated[
            Path | None,
            typer.Option("--config", metavar="FILE", is_eager=True, callback=_read, help="YAML file with values of these options."),
        ],
        "print_config": Annotated[bool, typer.Option("--print-config", help="Print the options as YAML for --config, and stop.")],
    }
    defaults = {"config": None, "print_config": False}
    hints = get_type_hints(command, include_extras=True)
    signature = inspect.signature(command)
    added = [
        inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(k, inspect.Parameter.empty), annotation=a)
        for k, a in own.items()
    ]
    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]) for name, p in signature.parameters.items()]
    wrapper.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    wrapper.__annotations__ = hints | own
    return wrapper  # type: ignore[return-value]


def _read(ctx: typer.Context, path: Path | None) -> Path | None:
    """Callback of --config: the file's values become the command's defaults, so that each is typed and checked like any option."""
    if path is not None:
        names = {p.name: p for p in ctx.command.params if p.name not in OWN}
        values = {}
        for key, value in load_mapping(path).items():
            name = str(key).replace("-", "_")
            if name not in names:
                options = [n.replace("_", "-") for n in names if n]
                hint = nearest(str(key).replace("_", "-"), options) or f"; it takes {', '.join(options)}"
                raise UsageError(f"{path}: {ctx.info_name} has no option {key!r}{hint}")
            if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value)):
                raise UsageError(f"{path}: {key} must be a single value or a plain list")
            if value is not None:
                values[name] = value
        ctx.default_map = values
    return path


def load_mapping(path: Path) -> dict[Any, Any]:
    """A YAML file whose top is a mapping.

    Raises:
        UsageError: no file, too large, not YAML, or not a mapping; the message names the file and the line.
    """
    import yaml

    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise UsageError(f"{path} has {path.stat().st_size} bytes; a file of options has at most {SIZE_LIMIT}")
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} must hold 'option: value' lines, got a {type(loaded).__name__}")
    return loaded


def _to_yaml(ctx: typer.Context) -> str:
    import yaml

    values = {p.name.replace("_", "-"): _plain(ctx.params.get(p.name)) for p in ctx.command.params if p.name and p.name not in OWN}
    return f"# {ctx.command_path} --config FILE\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
