"""Write the index (`catalog/index.json`) from the code: `python -m vitarium.cli.indexing [SLUG ...]`, or `make index`.

Every module is imported, so that everything registers itself; every model is built without weights and run once at a few image sizes on the
meta device. With slugs, only their entries are written again. `--quick` keeps the counted costs of models with unchanged arguments and
numbers of parameters. `--check` writes nothing and fails on differences.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from vitarium.catalog.classes import Classes
from vitarium.catalog.index import FORMAT, INDEX_COMMAND, module_of
from vitarium.catalog.systems import systems
from vitarium.cli.index_costs import described, plain, variant_sizes
from vitarium.errors import UsageError, VitariumError, nearest
from vitarium.files import write_text
from vitarium.texts import first_paragraph

ROOMS = ("training", "backbones", "efficiency", "generation", "perception", "pretraining", "explanation", "robustness")
FOREIGN = "vitarium.catalog.foreign"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog=INDEX_COMMAND, description="Write catalog/index.json from the code.")
    parser.add_argument("slugs", nargs="*", metavar="SLUG", help="systems (or modules) whose entries are written again; default: all")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the index differs from the code")
    parser.add_argument("--quick", action="store_true", help="keep the costs of models whose arguments and parameters are unchanged")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    given = parser.parse_args(arguments)
    try:
        return check_index(given.slugs, given.jobs) if given.check else write_index(given.slugs, given.jobs, quick=given.quick)
    except VitariumError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def write_index(slugs: Iterable[str] = (), jobs: int = 1, *, quick: bool = False) -> int:
    """Write the index, or only some of its entries; `quick` keeps the counted costs of models that look unchanged."""
    start = time.perf_counter()
    old = stored() if slugs or quick else {}
    fresh = build(slugs, jobs, known=rows_of(old) if quick else {})
    order = {system.slug: number for number, system in enumerate(systems())}
    entries = {**(old.get("entries", {}) if slugs else {}), **fresh["entries"]}
    entries = {slug: entries[slug] for slug in sorted(entries, key=lambda slug: (order.get(slug, len(order)), slug))}
    write_text(path(), text_of({"format": FORMAT, "entries": entries, "foreign": fresh["foreign"] or old.get("foreign", {})}))
    models = sum(len(family["variants"]) for entry in entries.values() for family in entry.get("families", {}).values())
    print(f"{path()}: {len(entries)} entries, {models} models, {time.perf_counter() - start:.0f} s")
    return 0


def check_index(slugs: Iterable[str] = (), jobs: int = 1) -> int:
    """Compare the index with the code, print the differences, and return 1 if there are any."""
    old, fresh = stored(), build(slugs, jobs)
    found = list(differences(fresh["entries"], {k: v for k, v in old.get("entries", {}).items() if not slugs or k in fresh["entries"]}))
    if not slugs:
        found += differences(fresh["foreign"], old.get("foreign", {}))
    for line in found:
        print(line)
    print(f"{len(found)} differences" + (f"; update the index with: {INDEX_COMMAND}" if found else ""))
    return 1 if found else 0


def path() -> Path:
    """Return the path of index.json in the package."""
    import vitarium.catalog

    return Path(vitarium.catalog.__file__).with_name("index.json")


def stored() -> dict[str, Any]:
    """Return the contents of index.json as plain values; empty if there is no such file.

    Raises:
        UsageError: the file is no JSON (as after a merge with conflicts).
    """
    try:
        return json.loads(path().read_text(encoding="utf-8")) if path().is_file() else {}
    except ValueError as error:
        raise UsageError(f"{path()} is damaged ({error}); write all of it with: {INDEX_COMMAND}") from error


def differences(new: Any, old: Any, place: str = "") -> Iterator[str]:
    """Yield a line for each value that differs; peak memory may differ by 10 % (other kernels, other machines)."""
    if isinstance(new, dict) and isinstance(old, dict):
        for key in dict.fromkeys((*new, *old)):
            yield from differences(new.get(key), old.get(key), f"{place}.{key}" if place else str(key))
    elif place.endswith(".peak_memory") and new and old:
        if abs(new - old) > 0.1 * old:
            yield f"{place}: {old} in the index, {new} in the code"
    elif new != old:
        yield f"{place}: {old!r} in the index, {new!r} in the code"


SPREAD = ("entries", "foreign", "families", "variants", "methods", "learners", "explainers", "tasks")
"""Tables of the file that hold one row a line."""


def text_of(index: dict[str, Any]) -> str:
    """Return the file's text, with one variant, argument or registered name a line, so that a change is a short diff."""
    return _lines(index, "", "entries") + "\n"


def _lines(value: Any, indent: str, key: str, parent: str = "") -> str:
    deeper = indent + "  "
    if isinstance(value, dict) and value and (key in SPREAD or parent in ("entries", "families")):
        rows = [f"{deeper}{json.dumps(k)}: {_lines(v, deeper, k, key)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(deeper + json.dumps(item, ensure_ascii=False) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


# ---- modules that register something


def rows_of(index: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of the models of an index, ours and foreign ones, by full name."""
    families = {name: family for entry in index.get("entries", {}).values() for name, family in entry.get("families", {}).items()}
    return {f"{name}_{v}": row for name, family in families.items() for v, row in family["variants"].items()} | index.get("foreign", {})


def build(slugs: Iterable[str] = (), jobs: int = 1, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Build entries (of some slugs, or all), and foreign models if all are built.

    Args:
        slugs: keys of entries; none: all.
        jobs: processes.
        known: full name -> earlier row of a model, whose counted costs are kept if it looks unchanged.

    Raises:
        UsageError: a slug that registers nothing.
    """
    homes = modules_by_entry()
    if wrong := [slug for slug in slugs if slug not in homes]:
        raise UsageError(f"nothing is registered by {wrong[0]!r}{nearest(wrong[0], homes)}")
    wanted = list(slugs) or list(homes)
    if jobs > 1:
        import multiprocessing

        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=modules_by_entry) as pool:
            rows = list(pool.map(_timed_entry, wanted, [homes[slug] for slug in wanted], [known or {}] * len(wanted)))
    else:
        rows = [_timed_entry(slug, homes[slug], known or {}) for slug in wanted]
    return {"entries": dict(zip(wanted, rows, strict=True)), "foreign": {} if slugs else foreign_models(known or {})}


def _timed_entry(slug: str, module: str, known: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        entry = entry_of_module(slug, module, known)
    except Exception as error:
        error.add_note(f"while the index entry of {slug} was made")
        raise
    print(f"  {slug}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return entry


def modules_by_entry() -> dict[str, str]:
    """Import everything and return the modules with an entry: slug of each implemented system, or name of each other module that registers
    something -> module."""
    for room in ROOMS:
        package = importlib.import_module(f"vitarium.{room}")
        for found in pkgutil.walk_packages(package.__path__, f"vitarium.{room}."):
            importlib.import_module(found.name)
    written = {module_of(s): s.slug for s in systems() if module_of(s) in sys.modules}
    homes = {slug: module for module, slug in written.items()}
    for cls in registered():
        if not any(_within(cls.__module__, module) for module in written):
            homes.setdefault(cls.__module__, cls.__module__)
    return homes


def registered() -> list[type]:
    """Return the library's own classes in the registries of families, methods, learners and explainers."""
    classes = [f.cls for f in _registry("vitarium.catalog.registry", "_FAMILIES").values()]
    for kind in REGISTRIES:
        classes += [type_of(c) for c in _registry(*REGISTRIES[kind]).values()]
    return [cls for cls in classes if cls.__module__.startswith("vitarium.")]


REGISTRIES = {
    "methods": ("vitarium.catalog.methods", "METHODS"),
    "learners": ("vitarium.training.learners", "LEARNERS"),
    "tasks": ("vitarium.training.tasks.registry", "TASKS"),
    "explainers": ("vitarium.explanation.explainers", "EXPLAINERS"),
}


def _registry(module: str, name: str) -> dict[str, Any]:
    found = getattr(importlib.import_module(module), name)
    return found.registered if isinstance(found, Classes) else found


def type_of(value: Any) -> type:
    """Return a class itself, or the class of an instance."""
    return value if isinstance(value, type) else type(value)


def _within(module: str, home: str) -> bool:
    return module == home or module.startswith(f"{home}.")


# ---- one entry


def entry_of_module(slug: str, module: str, known: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of one system or module: its registered names, and the costs of its models (see `build` for `known`)."""
    entry = registered_by(slug, module)
    families = [f for f in _registry("vitarium.catalog.registry", "_FAMILIES").values() if _within(f.cls.__module__, module)]
    entry["families"] = {f.name: family_row(f, {v: variant_row(f, v, known) for v in f.variants}) for f in families}
    return {key: value for key, value in entry.items() if value or key in ("module", "summary")}


def registered_by(slug: str, module: str) -> dict[str, Any]:
    """Return an entry without its families."""
    entry: dict[str, Any] = {"module": module, "summary": first_paragraph(sys.modules[module].__doc__), "families": {}}
    for kind, place in REGISTRIES.items():
        found = {name: type_of(c) for name, c in _registry(*place).items() if _within(type_of(c).__module__, module)}
        entry[kind] = {name: {"module": cls.__module__, **_facts(kind, cls)} for name, cls in sorted(found.items())}
    if any(system.slug == slug for system in systems()):
        entry["claim"] = _claim(slug)
    return entry


def _facts(kind: str, cls: Any) -> dict[str, Any]:
    if kind == "methods":
        helped = documented_arguments(cls.__doc__)
        options = [
            {"name": f.name, "default": plain(f.default), "help": helped.get(f.name, "")}
            for f in dataclasses.fields(cls)
            if f.metadata.get("saved", True)
        ]
        return {"kind": cls.kind, "training": cls.training, "summary": first_paragraph(cls.__doc__), "options": options}
    return {"task": cls.task_name} if kind == "learners" else {}


def _claim(slug: str) -> dict[str, Any] | None:
    from vitarium.claims.experiment import claimed_slugs, find_claim

    if slug not in claimed_slugs():
        return None
    claim = find_claim(slug)
    return {"says": claim.says, "minutes": claim.minutes}


def family_row(family: Any, variants: dict[str, Any]) -> dict[str, Any]:
    """Return a family's values, around those of its variants."""
    helped = EVERYWHERE | documented_arguments(family.cls.__doc__)
    parameters = inspect.signature(family.cls).parameters.values()
    return {
        "slug": family.slug,
        "module": family.cls.__module__,
        "learner": family.learner,
        "crop_pct": family.crop_pct,
        "arguments": [
            {"name": p.name, "default": plain(None if p.default is p.empty else p.default), "help": helped.get(p.name, "")}
            for p in parameters
        ],
        "variants": variants,
    }


EVERYWHERE = {"in_chans": "channels of the image.", "num_classes": "classes of the head; 0 for none."}
"""Help for arguments that every family has and docstrings omit."""


def variant_row(family: Any, variant: str, known: dict[str, Any]) -> dict[str, Any]:
    """Return a variant's values: its description, and its costs at its own and at other sizes."""
    name = f"{family.name}_{variant}"
    takes_size = "image_size" in inspect.signature(family.cls).parameters
    values = {k: plain(v) for k, v in family.arguments(variant).items()}
    earlier = known.get(name)
    same = earlier if earlier and earlier.get("arguments") == json.loads(json.dumps(values)) else None
    row = described(name, variant_sizes(family.variants[variant].get("image_size", 224)), rebuild=takes_size, known=same)
    shape = {key: family.variants[variant][key] for key in ("frames", "stride") if family.variants[variant].get(key)}
    weights = {tag: list(sources) for tag, sources in family.weights.get(variant, {}).items()}
    return row | {"arguments": values} | shape | ({"weights": weights} if weights else {})


def foreign_models(known: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of the small foreign models that comparisons use."""
    small: Any = importlib.import_module(FOREIGN)
    return {
        f"timm/{name}": described(f"timm/{name}", variant_sizes(16), rebuild=True, known=known.get(f"timm/{name}"))
        for name in small.TIMM_PICO
    }


# ---- docstrings


def documented_arguments(doc: str | None) -> dict[str, str]:
    """Return the "Args:" section of a docstring: name -> text on one line."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(doc or ""), re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\S)", "\n" + section[1]) if section else []:
        names, colon, text = entry.strip().partition(":")
        if colon:
            found |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return found


if __name__ == "__main__":
    sys.exit(main())
