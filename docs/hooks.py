"""Computed pages: the 103 systems with their status, a page for each existing one, the ledger, the commands, the speed."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import command_pictures  # mkdocs finds a hook's imports beside it
import ledger
import pictures as drawn
import speed
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add a page for each command to the navigation."""
    for entry in config.nav or []:
        if "Commands" in entry:
            entry["Commands"] = [{"Overview": "commands.md"}, *({name: f"commands/vitarium-{name}.md"} for name in _commands())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the computed pages to the written ones."""
    pages = {
        "systems.md": systems_page(),
        "ledger.md": ledger.page(),
        "combinations.md": combinations_page(),
        "speed.md": speed.page(),
    }
    pages |= command_pages()
    pages |= gallery_pages()
    pages |= system_pages()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for name, picture in pictures().items():
        files.append(File.generated(config, name, content=picture))
    return files


def systems_page() -> str:
    """Return the page of all 103 systems with their evidence."""
    from vitarium.catalog.evidence import system_statuses

    statuses = system_statuses()
    count = {word: sum(s.status == word for s in statuses) for word in ("working", "partial", "missing")}
    rows = []
    for s in sorted(statuses, key=lambda s: (("working", "partial", "missing").index(s.status), s.room, s.slug)):
        e = s.evidence
        name = f"[`{s.slug}`](systems/{s.slug}.md)" if s.status != "missing" else f"`{s.slug}`"
        goldens = f"{e.goldens_passed} of {e.goldens_wired}" if e.goldens_wired else ""
        rows.append(f"| {name} | {s.title} | {s.room} | {s.status} | {goldens} | {e.identities or ''} | {e.claim or ''} |")
    return "\n".join(
        [
            "# The 103 systems",
            "",
            f"{count['working']} working, {count['partial']} partial, {count['missing']} not yet. Computed from what is there: models, "
            "golden vectors of the original implementations, exact identities, and the outcome of the claim (`vitarium systems`).",
            "",
            "| system | paper | room | status | goldens passed | identities | claim |",
            "|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


def system_pages() -> dict[str, str]:
    """Return systems/<slug>.md for each existing system."""
    from vitarium.catalog import families, systems
    from vitarium.catalog.registry import system_module

    pages = {}
    for system in systems():
        name = system_module(system.slug)
        if name is None:
            continue
        module = importlib.import_module(name)
        summary, _, rest = (inspect.getdoc(module) or system.title).partition("\n")
        parts = [f"# {system.slug}", "", f"**{summary}**", "", _paragraphs(rest), ""]
        if f"systems/{system.slug}.png" in pictures():
            parts += [f"![{PICTURES[system.slug][1]}]({system.slug}.png)", "", f"*{PICTURES[system.slug][1]}*", ""]
        for family in families(system.slug):
            parts += [f"## Variants of `{family.name}`", "", "| name | image | arguments | weights |", "|---|---|---|---|"]
            for variant, arguments in family.variants.items():
                values = ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in arguments.items() if k != "image_size")
                tags = ", ".join(f"`{tag}`" for tag in family.weights.get(variant, {}))
                parts.append(f"| `{family.name}_{variant}` | {arguments.get('image_size', 224)} | {values} | {tags} |")
            parts.append("")
        parts += [ledger.claim_section(system.slug), "## In Python", ""]
        classes = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if _belongs(cls, name) and cls.__doc__]
        parts += [f"::: {name}.{cls.__name__}\n    options:\n      members: false\n" for cls in sorted(classes, key=_line)]
        pages[f"systems/{system.slug}.md"] = "\n".join(parts)
    return pages


def _belongs(cls: type, module: str) -> bool:
    """Return whether a class is defined in a module, or in a file of the package that it is."""
    return cls.__module__ == module or cls.__module__.startswith(f"{module}.")


def _line(cls: type) -> tuple[str, int]:
    return cls.__module__, inspect.getsourcelines(cls)[1]


def _paragraphs(text: str) -> str:
    """Convert a docstring to Markdown, with indented equations as code blocks."""
    return text.strip("\n")


def combinations_page() -> str:
    """Return the page of tested combinations of methods and models, with the remaining cost."""
    rows = json.loads((Path(__file__).parent / "examples" / "combinations.json").read_text(encoding="utf-8"))
    smaller = list(dict.fromkeys(row["smaller"] for row in rows))
    parts = [
        "# Methods in combination",
        "",
        "Each cell was run, saved to one file, loaded again, and gave the same logits bit for bit",
        "(`tests/efficiency/test_combinations.py`). The models have their libraries' own widths and are cut to two blocks and at most",
        "64 patches. Each cell gives the remaining share of the multiply-accumulates and of the size on disk: a quantizer keeps the first,",
        "a token reduction the second.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        parts += ["", f"## {model}", "", f"| | {' | '.join(smaller)} |", "|---|" + "---|" * len(smaller)]
        for reducer in dict.fromkeys(row["reducer"] for row in rows):
            found = {row["smaller"]: row for row in rows if (row["model"], row["reducer"]) == (model, reducer)}
            cells = [
                f"{100 * found[s]['macs']:.0f} % MACs, {100 * found[s]['file']:.0f} % size" if s in found else "failed" for s in smaller
            ]
            parts.append(f"| {reducer} | {' | '.join(cells)} |")
    return "\n".join(parts)


def gallery_pages() -> dict[str, str]:
    """Return gallery.md and its report: `vitarium compare --data digits --models '*_pico'`, drawn again from its results.json."""
    from vitarium.data import open_data
    from vitarium.reports.compare import gallery_images
    from vitarium.reports.page import render
    from vitarium.reports.results import Comparison

    values = json.loads((Path(__file__).parent / "examples" / "gallery.json").read_text(encoding="utf-8"))
    found = Comparison.from_dict(values, Path("runs", "gallery"))
    digits = open_data(found.data, seed=values["settings"]["seed"])
    rows = [
        f"| `{t.name}` | {100 * t.score:.1f} % | {t.latency_ms:.2f} ms | {t.throughput:,.0f} | {t.params / 1e3:.0f} K "
        f"| {t.macs / 1e6:.2f} M | {t.seconds:.0f} s |"
        for t in sorted(found.trials, key=lambda t: (-t.score, t.latency_ms))
    ]
    minutes = sum(t.seconds for t in found.trials) / 60
    page = [
        "# Gallery: every family on one page",
        "",
        f"The smallest variant of each family, trained from scratch on the embedded {found.data} ({found.images['train']:,} images of",
        f"16 x 16, {found.images['val']} held out) for {found.budget['steps']} steps under one recipe; {minutes:.0f} minutes of training.",
        "",
        "```",
        "vitarium compare --data digits --models '*_pico'",
        "```",
        "",
        f"{found.recommendation.sentence}",
        "",
        "Differences below one standard error, half a point here, are noise, and one easy task is no evidence for photographs.",
        "",
        '<iframe src="report.html" title="The report of the comparison" style="width: 100%; height: 46rem; border: 1px solid #8884">'
        "</iframe>",
        "",
        "[Open the report](report.html){target=_blank}",
        "",
        "| model | accuracy | latency, batch 1 | images/s | parameters | MACs | training |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    return {"gallery/index.md": "\n".join(page), "gallery/report.html": render(found, gallery_images(found, digits))}


def command_pages() -> dict[str, str]:
    """Return commands.md, a table of all commands, and commands/vitarium-<name>.md with the options of each, from the command line's own
    description and docs/examples/<name>.md. ("commands/index.md" would be the address of the table.)"""
    rows = [f"| [`{name}`](commands/vitarium-{name}.md) | {_first_sentence(command.help)} |" for name, command in _commands().items()]
    head = [
        "# Commands",
        "",
        "Every command explains itself with `--help`. Exit codes: 2 usage, 3 data, 4 checkpoint, 5 training stopped for cause,",
        "130 interrupted. Each is one function in Python, too: [the front door](api/front.md).",
        "",
        "| command | |",
        "|---|---|",
    ]
    pages = {f"commands/vitarium-{name}.md": _command_page(name, command) for name, command in _commands().items()}
    return {"commands.md": "\n".join([*head, *rows, ""]), **pages}


def _commands() -> dict[str, Any]:
    import typer

    from vitarium.cli.app import app

    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def _first_sentence(text: str | None) -> str:
    return re.sub(r" \(.*", "", re.split(r"(?<=\.)\s", " ".join((text or "").split()))[0])


def _command_page(name: str, command: Any) -> str:
    usage = " ".join(
        f"{p.metavar or p.name.upper()}{'...' if p.nargs == -1 else ''}" for p in command.params if p.param_type_name == "argument"
    )
    line = f"vitarium {name} {usage} [OPTIONS]".replace("  ", " ")
    parts = [f"# vitarium {name}", "", inspect.cleandoc(command.help or ""), "", "```", line, "```", ""]
    example = Path(__file__).parent / "examples" / f"{name}.md"
    if example.exists():
        parts += [_from_below(example.read_text(encoding="utf-8")), ""]
    options = [p for p in command.params if p.param_type_name == "option"]
    if options:
        parts += ["## Options", "", "| option | meaning |", "|---|---|"]
        parts += [f"| `{', '.join(p.opts)}` | {_meaning(p)} |" for p in options]
        parts.append("")
    return "\n".join(parts)


def _meaning(option: Any) -> str:
    """Return the help of an option with its default, as the command line shows it."""
    shown = option.show_default if isinstance(option.show_default, str) else option.default
    default = "" if shown in (None, False, True, "", ()) or callable(shown) else f" *Default: {getattr(shown, 'value', shown)}.*"
    return f"{getattr(option, 'help', '') or ''}{default}".replace("|", chr(92) + "|")


def _from_below(text: str) -> str:
    """Return Markdown whose links and images are relative to docs/ for a page in docs/commands/."""
    below = re.sub(r"\]\((?!https?:|#|/|commands/)", "](../", text)
    return below.replace("](commands/", "](")


PICTURES: dict[str, tuple[str, str]] = {
    "swin": ("swin", "Unshifted and shifted windows; the colours of a shifted window are regions that do not attend to one another."),
    "convnext": (
        "convnext",
        "Effective receptive field of a cell of the last map: gradient, four decades, for kernels of 3, 5, 7 and 9 (random weights).",
    ),
    "vim": (
        "vim",
        "Hidden attention of the class token in three blocks (two decades) of vim_pico after 250 steps on tiles of photographs. "
        "The token is in the middle of the sequence: one scan reaches it from above, the other from below, and both decay on the way.",
    ),
}


def pictures() -> dict[str, bytes]:
    """Add drawings of the systems, by their own code (`docs/pictures.py`), and of the commands (`docs/command_pictures.py`)."""
    global _PICTURES
    if _PICTURES is None:
        _PICTURES = {f"systems/{slug}.png": getattr(drawn, function)() for slug, (function, _) in PICTURES.items()}
        _PICTURES |= {f"commands/{name}.svg": command_pictures.draw(name) for name in command_pictures.DRAWN}
    return _PICTURES


_PICTURES: dict[str, bytes] | None = None
