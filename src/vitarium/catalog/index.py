"""The index of everything that is registered: generated, committed, and read without importing torch.

`index.json` holds one entry for each system, and one for each further module that registers something (plain training, the diffusion base,
the simple explainers). It lists all models, methods, learners and explainers, the module that registers each, and the cost of each model.
At run time, listing, search and name lookup read only this file. The command `INDEX_COMMAND` writes it from the code.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import resources
from typing import Any, Literal

from vitarium.catalog.systems import System, find_system, systems
from vitarium.errors import UsageError

FORMAT = 1
INDEX_COMMAND = "python -m vitarium.cli.indexing"
REFUSED = "refused"
"""Value that marks, in the file, a size at which the model cannot be built."""

Registry = Literal["methods", "learners", "explainers", "tasks"]


@dataclass(frozen=True)
class Cost:
    """The cost of one image (or clip) at one size.

    Attributes:
        image_size: side of the square input, pixels.
        params: number of parameters.
        bytes: size of parameters and buffers in memory.
        macs: multiply-accumulates of one forward pass.
        peak_memory: most bytes alive at once in one forward pass: weights, input and activations.
        unknown: names of the quantities that the index does not hold at this size. A quantity that is None and not listed here does not
            exist (a model that takes no such input).
    """

    image_size: int
    params: int | None
    bytes: int | None
    macs: int | None
    peak_memory: int | None
    unknown: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Law:
    """The growth of a model's MACs with the image size: c0 + c1 S^2 + c2 S^4, which is exact for convolutions and global attention.

    Attributes:
        step: the law holds for multiples of this many pixels,
        anchors: between the first and the last of these three measured sizes, which also determine its coefficients.
        weights: whether parameters and bytes, where they depend on the size, are exactly quadratic in it (position tables).
    """

    step: int
    anchors: tuple[int, int, int]
    weights: bool = True

    def holds(self, image_size: int) -> bool:
        """Return whether the law was checked for images of this size."""
        return image_size % self.step == 0 and self.anchors[0] <= image_size <= self.anchors[-1]


def interpolate(x: int, points: list[tuple[int, int]]) -> int:
    """Evaluate the polynomial through `points` at `x` (Lagrange), exactly, and round it."""
    total = Fraction(0)
    for i, (xi, yi) in enumerate(points):
        term = Fraction(yi)
        for j, (xj, _) in enumerate(points):
            if j != i:
                term *= Fraction(x - xj, xi - xj)
        total += term
    return round(total)


@dataclass(frozen=True)
class Variant:
    """One model: its constructor's arguments and its cost.

    Attributes:
        name: full name, such as "swin_tiny".
        variant: name within the family, such as "tiny".
        arguments: values that the variant passes to the constructor.
        image_size, frames, stride: the default input (`frames` and `stride`: of a clip).
        inputs: names of the forward's inputs, as `catalog.calling.example_inputs` makes them.
        params, bytes, macs, peak_memory: see `Cost`, at `image_size`.
        num_classes: outputs of the head; None where it has none.
        stages: (module, channels, stride) of each feature map.
        preprocessing: fields of `Preprocessing`.
        weights: tag -> sources.
        sizes: image size -> MACs, or (MACs, params, bytes) where these depend on the size, or `REFUSED`; None: no MACs at this size.
        law: MACs at sizes that were not measured.
    """

    name: str
    variant: str
    image_size: int
    params: int
    bytes: int
    macs: int | None
    peak_memory: int | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    frames: int | None = None
    stride: int | None = None
    inputs: tuple[str, ...] = ("image",)
    num_classes: int | None = None
    stages: tuple[tuple[str, int, int], ...] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, list[str]] = field(default_factory=dict)
    sizes: Mapping[int, Any] = field(default_factory=dict)
    law: Law | None = None

    def cost(self, image_size: int | None = None) -> Cost:
        """Return the cost at an image size; quantities that the index does not hold are None and listed in `unknown`.

        Args:
            image_size: side of the square input, pixels; None: the variant's own.

        Raises:
            UsageError: the model cannot be built for this size.
        """
        if image_size in (None, self.image_size):
            return Cost(self.image_size, self.params, self.bytes, self.macs, self.peak_memory)
        assert image_size is not None
        measured = self.measured()
        if self.sizes.get(image_size) == REFUSED:
            raise UsageError(f"{self.name} cannot be built for {image_size} pixels (made for {self.image_size})")
        if image_size in measured:
            macs, params, weights = measured[image_size]
            return Cost(image_size, params, weights, macs, None, frozenset() if macs is None else frozenset({"peak_memory"}))
        macs, params, weights = (self._by_law(image_size, [row[i] for row in measured.values()], i) for i in range(3))
        values = {"macs": macs, "params": params, "bytes": weights, "peak_memory": None}
        exist = {"params", "bytes"} | ({"macs", "peak_memory"} if self.macs is not None else set())
        return Cost(image_size, params, weights, macs, None, frozenset(name for name in exist if values[name] is None))

    def _by_law(self, image_size: int, values: list[int | None], column: int) -> int | None:
        """Return MACs, parameters or bytes (column 0, 1, 2) at a size that was not measured, or None."""
        if column and len(set(values)) == 1:
            return values[0]  # the same at every size
        if self.law is None or not self.law.holds(image_size) or (column and not self.law.weights):
            return None
        measured = self.measured()
        power = 1 if column else 2
        return interpolate(image_size**power, [(size**power, measured[size][column]) for size in self.law.anchors])

    def measured(self) -> dict[int, Any]:
        """Return the measured sizes in order, the variant's own included: size -> (MACs or None, parameters, bytes)."""
        rows = {
            size: row if isinstance(row, list) else (row, self.params, self.bytes) for size, row in self.sizes.items() if row != REFUSED
        }
        return dict(sorted({**rows, self.image_size: (self.macs, self.params, self.bytes)}.items()))


@dataclass(frozen=True)
class IndexedFamily:
    """A family of variants of one class.

    Attributes:
        name: prefix of its models' names.
        slug: its system, or a base that several systems use.
        module: dotted name of the module that registers it.
        learner: name of the learner that trains and evaluates its models; `Index.task` has its task.
        arguments: of the constructor: {"name", "default", "help"}.
        crop_pct: see `Preprocessing`.
        variants: by name within the family.
    """

    name: str
    slug: str
    module: str
    learner: str
    arguments: list[dict[str, Any]]
    crop_pct: float
    variants: Mapping[str, Variant]


@dataclass(frozen=True)
class Entry:
    """Entries of one system, or of one module that belongs to no system.

    Attributes:
        slug: the system, or the module's dotted name.
        module: dotted name.
        summary: first paragraph of the module's docstring.
        families: by name.
        methods, learners, explainers, tasks: name -> {"module"}; of methods also "kind", "training", "summary" and "options" ({"name",
            "default", "help"} each), of learners "task".
        claim: {"says", "minutes"}, or None if the system has none.
    """

    slug: str
    module: str
    summary: str
    families: Mapping[str, IndexedFamily]
    methods: Mapping[str, dict[str, Any]]
    learners: Mapping[str, dict[str, Any]]
    explainers: Mapping[str, dict[str, Any]]
    tasks: Mapping[str, dict[str, Any]]
    claim: Mapping[str, Any] | None

    def models(self) -> list[str]:
        """Return the names of its models."""
        return [v.name for f in self.families.values() for v in f.variants.values()]


@dataclass(frozen=True)
class Index:
    """The contents of index.json.

    Attributes:
        entries: slug of a system, or name of another module -> entry; systems first, in the order of systems.toml.
        foreign: small models of other libraries that comparisons use, by full name ("timm/vit_pico").
    """

    entries: Mapping[str, Entry]
    foreign: Mapping[str, Variant]

    def families(self) -> Iterator[IndexedFamily]:
        """Yield all families."""
        for entry in self.entries.values():
            yield from entry.families.values()

    def names(self, registry: Registry) -> list[str]:
        """Return the names in a registry, sorted."""
        return sorted(name for entry in self.entries.values() for name in getattr(entry, registry))

    def home(self, registry: Registry, name: str) -> str | None:
        """Return the module that registers `name`, or None."""
        return next((getattr(e, registry)[name]["module"] for e in self.entries.values() if name in getattr(e, registry)), None)

    def task(self, learner: str) -> str | None:
        """Return the task of a learner, or None where no such learner is indexed."""
        return next((e.learners[learner].get("task") for e in self.entries.values() if learner in e.learners), None)

    @functools.cached_property
    def models(self) -> dict[str, tuple[IndexedFamily, Variant]]:
        """Full name -> (family, variant) of the library's own models."""
        return {v.name: (f, v) for f in self.families() for v in f.variants.values()}


@functools.cache
def read_index() -> Index:
    """Read index.json.

    Raises:
        UsageError: it is missing, damaged or of another format; the message names the command that writes it.
    """
    file = resources.files("vitarium.catalog").joinpath("index.json")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {file} ({error}); write it with: {INDEX_COMMAND}") from error
    if values.get("format") != FORMAT:
        raise UsageError(f"{file} has format {values.get('format')}, this version reads {FORMAT}; write it with: {INDEX_COMMAND}")
    return Index(
        {slug: _entry(slug, row) for slug, row in values["entries"].items()},
        {name: _variant(name, name.split("/")[1], row) for name, row in values["foreign"].items()},
    )


def _entry(slug: str, row: dict[str, Any]) -> Entry:
    families = {name: _family(name, family) for name, family in row.get("families", {}).items()}
    registered = {kind: row.get(kind, {}) for kind in ("methods", "learners", "explainers", "tasks")}
    return Entry(slug, row["module"], row["summary"], families, claim=row.get("claim"), **registered)


def _family(name: str, row: dict[str, Any]) -> IndexedFamily:
    variants = {key: _variant(f"{name}_{key}", key, values) for key, values in row["variants"].items()}
    return IndexedFamily(name, **{**row, "variants": variants})


def _variant(name: str, key: str, row: dict[str, Any]) -> Variant:
    sizes = {int(size): value for size, value in row.get("sizes", {}).items()}
    law = Law(row["law"]["step"], tuple(row["law"]["anchors"]), row["law"].get("weights", True)) if "law" in row else None
    stages, inputs = tuple(tuple(stage) for stage in row.get("stages", ())), tuple(row.get("inputs", ("image",)))
    return Variant(name, key, **{**row, "sizes": sizes, "law": law, "stages": stages, "inputs": inputs})  # type: ignore[arg-type]


# ---- queries from the rest of the library


def entry_of(slug: str) -> Entry | None:
    """Return the entry of a system, or None if the system is not implemented yet.

    Raises:
        UsageError: there is no such system, or its module exists and the index lacks it; the message names the command that adds it.
    """
    system = find_system(slug)
    entry = read_index().entries.get(slug)
    if entry is None and is_written(system):
        raise UsageError(f"the index lacks {slug}, whose module exists; add it with: {INDEX_COMMAND} {slug}")
    return entry


def module_of(system: System) -> str:
    """Return the dotted name that the module of a system has or will have."""
    return f"vitarium.{system.room.replace('/', '.')}.{system.slug}"


def room_of(slug: str, module: str) -> str:
    """Return the folder of a system, such as "efficiency/tokens"; of a base, the room of its module."""
    return next((system.room for system in systems() if system.slug == slug), module.split(".")[1])


def is_written(system: System) -> bool:
    """Return whether the module of a system exists. Imports nothing."""
    folder = resources.files("vitarium").joinpath(*system.room.split("/"))
    return folder.joinpath(f"{system.slug}.py").is_file() or folder.joinpath(system.slug, "__init__.py").is_file()


def lacking(name: str) -> str:
    """Return the end of an error message for an unknown `name`: the command to run, if the name may belong to a system that the index
    lacks."""
    for system in systems():
        if (name == system.slug or name.startswith(f"{system.slug}_")) and system.slug not in read_index().entries and is_written(system):
            return f"; the index lacks {system.slug}, whose module is there: add it with {INDEX_COMMAND} {system.slug}"
    return ""


def at_size(preprocessing: Mapping[str, Any], image_size: int, crop_pct: float) -> dict[str, Any]:
    """Return a variant's preprocessing for images of another size, equal to that of `Family.preprocessing`."""
    return {**preprocessing, "image_size": image_size, "crop_pct": 1.0 if image_size < 128 else crop_pct}
