"""Shell completion of names, read from the index (`vitarium --install-completion`).

Where a file may stand as well, shells complete files when no name begins with the text.
"""

from __future__ import annotations

from vitarium.catalog.index import read_index
from vitarium.catalog.systems import systems


def complete_model(incomplete: str) -> list[str]:
    """Return the names of models, ours and the small foreign ones, that begin with `incomplete`."""
    index = read_index()
    return [name for name in (*index.models, *index.foreign) if name.startswith(incomplete)]


def complete_models(incomplete: str) -> list[str]:
    """Return completions of the last name of a list with commas ("swin_tiny,convnext_t")."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in complete_model(last)]


def complete_data(incomplete: str) -> list[str]:
    """Return the embedded data sets, the kinds of files with options, and the folders that begin with `incomplete`."""
    from glob import escape, glob

    names = ["fashion", "digits", "photos", "scenes", "embedded:", "folder:", "csv:", "wds:", "hf:"]
    return [*(name for name in names if name.startswith(incomplete)), *sorted(glob(f"{escape(incomplete)}*/"))]


def complete_weights(incomplete: str) -> list[str]:
    """Return the names of models and, after a dot, of their published weights ("swin_tiny.in22k")."""
    name, dot, tag = incomplete.partition(".")
    found = read_index().models.get(name) if dot else None
    return [f"{name}.{t}" for t in found[1].weights if t.startswith(tag)] if found else complete_model(incomplete)


def complete_system(incomplete: str) -> list[str]:
    """Return the slugs of systems that begin with `incomplete`."""
    return [system.slug for system in systems() if system.slug.startswith(incomplete)]


def complete_claim(incomplete: str) -> list[str]:
    """Return the slugs of systems that have a claim."""
    return [slug for slug, entry in read_index().entries.items() if entry.claim and slug.startswith(incomplete)]


def complete_room(incomplete: str) -> list[str]:
    """Return the rooms that begin with `incomplete`."""
    rooms = sorted({part for s in systems() for part in (s.room, s.room.split("/")[0])})
    return [room for room in rooms if room.startswith(incomplete)]


def complete_explainer(incomplete: str) -> list[str]:
    """Return the names of explainers that begin with `incomplete`."""
    return [name for name in read_index().names("explainers") if name.startswith(incomplete)]


def complete_task(incomplete: str) -> list[str]:
    """Return the names of tasks that begin with `incomplete`."""
    return [name for name in read_index().names("tasks") if name.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """Return the names of the library's recipes that begin with `incomplete`."""
    from vitarium.catalog.recipes import recipe_rows

    return [row.name for row in recipe_rows() if row.name.startswith(incomplete)]


def complete_recipe_or_model(incomplete: str) -> list[str]:
    """Return the names of recipes and of models that begin with `incomplete`."""
    return list(dict.fromkeys([*complete_recipe(incomplete), *complete_model(incomplete)]))


def complete_method(incomplete: str) -> list[str]:
    """Return the slugs of methods that begin with `incomplete`."""
    return [name for name in read_index().names("methods") if name.startswith(incomplete)]
