"""`--config` and `--print-config`: read the options of a command from a YAML file, and print them as one."""

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
OWN = ("config", "print_config", "help")


def configurable(command: Command) -> Command:
    """Add `--config FILE` (options from YAML; the command line has priority) and `--print-config` (print them and stop) to a command."""

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
    """Read --config: the file's values become the command's defaults, so that they are converted and checked like options."""
    if path is not None:
        from vitarium.training.settings import read_settings

        given = read_settings(path) or {}
        if not isinstance(given, dict):
            raise UsageError(f"{path} must hold 'option: value' lines, got a {type(given).__name__}")
        names = keys(ctx)
        values = {}
        for given_key, value in given.items():
            key = str(given_key).replace("_", "-")
            if key not in names:
                raise UsageError(f"{path}: {ctx.info_name} has no option {given_key!r}{nearest(key, names)} (it takes {', '.join(names)})")
            if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value)):
                raise UsageError(f"{path}: {key} must be a single value or a plain list")
            if isinstance(value, list) and not takes_several(ctx, names[key]):
                value = ",".join(map(str, value))  # names with commas, as on the command line
            if value is not None:
                values[names[key]] = value
        ctx.default_map = values
    return path


def keys(ctx: typer.Context) -> dict[str, str]:
    """Return for each option and argument its key in a file (the long name without leading dashes) -> the parameter's name."""
    named = {next((o for o in p.opts if o.startswith("--")), p.name or "").lstrip("-").replace("_", "-"): p for p in ctx.command.params}
    return {key: p.name for key, p in named.items() if p.name and p.name not in OWN}


def takes_several(ctx: typer.Context, name: str) -> bool:
    """Return whether a parameter may be given more than once."""
    return any(p.name == name and (getattr(p, "multiple", False) or p.nargs != 1) for p in ctx.command.params)


def _to_yaml(ctx: typer.Context) -> str:
    import yaml

    values = {key: _plain(ctx.params.get(name)) for key, name in keys(ctx).items()}
    return f"# {ctx.command_path} --config FILE\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
