"""Each backbone beside its best public implementation and a plain ViT, and how its time and memory grow with the image.

    OMP_NUM_THREADS=1 python benchmarks/backbones.py                                   # what the docs' page shows
    OMP_NUM_THREADS=1 python benchmarks/backbones.py --models swin_tiny --kinds inference --batches 1 --rounds 9
    OMP_NUM_THREADS=1 python benchmarks/backbones.py --kinds compiled --models tinyvit_21m maxvit_tiny
    OMP_NUM_THREADS=1 python benchmarks/backbones.py --kinds onnxruntime openvino --batches 8 --rounds 21
    python benchmarks/backbones.py --device cuda --dtypes bfloat16 --kinds inference training compiled

Every measurement is written to the file at once; one that is there is not made again (unless with --again), so a run that was stopped goes
on where it was. Timing is that of `vitarium bench`: equal weights, outputs proven equal first, arms in turns, ours against ours beside it.
Of exported graphs (`deployed.py`), only the models with a public implementation are measured unless `--models` names others.
The peer is timm's model, or what `reference` in the system's own test gives: transformers' model, or the equations written out.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the references are in tests/

import vitarium  # noqa: E402
from benchmarks.deployed import Graphs  # noqa: E402
from vitarium.catalog import Family, families, find_model  # noqa: E402
from vitarium.efficiency.bench import KINDS, Contest, OutputsDiffer, measure, paired, prepare  # noqa: E402
from vitarium.efficiency.profiler import count_params, example_image, peak_memory, weight_bytes  # noqa: E402
from vitarium.efficiency.runtimes import GRAPHS  # noqa: E402
from vitarium.engine.machine import describe_machine  # noqa: E402
from vitarium.files import write_json  # noqa: E402
from vitarium.nn import Backbone  # noqa: E402

OUTPUT = ROOT / "docs" / "examples" / "backbones.json"
YARDSTICK = "timm/vit_small_patch16_224"
YARDSTICK_PARAMS = 22e6
SCALING = "scaling"
SIDES = (224, 448, 896)
"""Images by which growth is measured, pixels a side."""
EXPORTED = (
    "swin_tiny", "tnt_s_patch16", "maxvit_tiny", "convit_small", "convnext_tiny", "tinyvit_5m", "tinyvit_21m", "crossvit_small", "cvt_13",
)  # fmt: skip
"""Models whose exported graphs are compared with a public implementation's."""
COMPILED = ("swin_tiny",)
"""Compiled without being asked: it takes minutes a model."""


@dataclass(frozen=True)
class Cell:
    """One measurement to make; `kind` is one of `vitarium bench`'s, or "scaling"."""

    model: str
    kind: str
    dtype: str
    batch: int
    device: str


# ---- what is measured


def default_models() -> list[str]:
    """Of each system's first family of image backbones the variant whose size is nearest to the yardstick's."""
    first: dict[str, Family] = {}
    for family in families():
        image = issubclass(family.cls, Backbone) and family.cls.axes == "HW"
        if family.room == "backbones" and image:
            first.setdefault(family.slug, family)
    return sorted(nearest_variant(family) for family in first.values())


def nearest_variant(family: Family) -> str:
    """The model of a family whose image size, then number of parameters, is nearest to the yardstick's; the first of equals, never pico."""

    def distance(name: str) -> tuple[int, float]:
        with torch.device("meta"):
            params = count_params(vitarium.create_model(name))
        return abs(family.preprocessing(find_model(name)[1]).image_size - SIDES[0]), abs(math.log(params / YARDSTICK_PARAMS))

    return min((name for name in family.model_names() if not name.endswith("_pico")), key=distance)


def plan(models: Sequence[str], device: str) -> list[Cell]:
    """The default cells, the most wanted first."""
    cells = [
        Cell(m, kind, "float32", batch, device) for m in models for kind, batch in (("inference", 8), ("inference", 1), ("training", 1))
    ]
    cells += [Cell(m, SCALING, "float32", 1, device) for m in (YARDSTICK, *models)]
    cells += [Cell(m, "inference", "bfloat16", 8, device) for m in models]
    return cells + [Cell(m, "compiled", "float32", 1, device) for m in models if m in COMPILED]


def chosen(models: Sequence[str], kinds: Sequence[str], dtypes: Sequence[str], batches: Sequence[int], device: str) -> list[Cell]:
    """The cells that the options name; growth is measured at batch 1."""
    cells = [Cell(m, k, t, 1 if k == SCALING else b, device) for t in dtypes for m in models for k in kinds for b in batches]
    return list(dict.fromkeys(cells))


# ---- what was measured


class Results:
    """Rows in a JSON file, which is whole at every moment."""

    def __init__(self, path: Path):
        self.path = path
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        self.rows: dict[Cell, dict[str, Any]] = {cell_of(row): row for row in found}

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those without a measurement; one that failed is missing."""
        return [cell for cell in cells if self.rows.get(cell, {"failed": ""}).get("failed") is not None]

    def add(self, cell: Cell, row: dict[str, Any]) -> None:
        """In its place, and into the file. A failure does not replace a measurement."""
        if "failed" in row and not self.missing([cell]):
            return
        self.rows[cell] = asdict(cell) | row | provenance(cell.device)
        write_json(self.path, [self.rows[key] for key in sorted(self.rows, key=astuple)])


def cell_of(row: dict[str, Any]) -> Cell:
    return Cell(row["model"], row["kind"], row["dtype"], row["batch"], row["device"])


def provenance(device: str) -> dict[str, Any]:
    """Of a row: date, machine, versions."""
    machine = describe_machine()
    where = machine["accelerator"] if device == "cuda" else f"{machine['processor']}, {machine['cores']} cores"
    versions = {name: machine[name] for name in ("python", "torch", "timm", "vitarium")}
    return {"date": datetime.date.today().isoformat(), "machine": where, "versions": versions}


# ---- measuring


def reference_of(slug: str) -> Callable[[nn.Module], Any] | None:
    """`reference` of a system's own test: model -> the same function by other code; None where there is none."""
    name = f"tests.backbones.test_{slug}"
    if importlib.util.find_spec(name) is None:
        return None
    return getattr(importlib.import_module(name), "reference", None)


def open_contest(model: str, dtype: str, device: str) -> tuple[Contest, str]:
    """The model beside its peer, and why there is none where the peer cannot run in this dtype."""
    options: dict[str, Any] = dict(dtype=getattr(torch, dtype), device=device)
    reference = reference_of(find_model(model)[0].slug)
    try:
        return prepare(model, reference=reference, **options), ""
    except RuntimeError as error:  # an operation that is not there in half precision
        if dtype == "float32" or isinstance(error, OutputsDiffer):
            raise
        return prepare(model, peers=False, **options), f"no peer in {dtype}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def grow(model: str, dtype: str, device: str, rounds: int, sides: Sequence[int] = SIDES) -> dict[str, Any]:
    """Time and memory of one image by its area, after `fuse()`: sizes take turns, each with a model made for it."""
    models, images = {}, {}
    for side in sides:
        torch.manual_seed(0)
        made = vitarium.create_model(model, image_size=side).eval()
        made = made.fuse() if isinstance(made, Backbone) else made
        models[side] = made.to(device, getattr(torch, dtype))
        images[side] = example_image(made, side)
    memory = [peak_memory(models[side], images[side]) - weight_bytes(models[side]) for side in sides]

    def call(side: int) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                models[side](images[side])

        return run

    times = paired({str(side): call(side) for side in sides}, rounds=rounds, device=device)
    areas = [side**2 for side in sides]
    slopes = [exponent(areas, seconds) for seconds in zip(*(times[str(side)] for side in sides), strict=True)]
    return {
        "image_sizes": list(sides),
        "ms": [1e3 * statistics.median(times[str(side)]) for side in sides],
        "mb": [value / 1e6 for value in memory],
        "time_exponent": statistics.median(slopes),
        "time_exponent_low": min(slopes),
        "time_exponent_high": max(slopes),
        "memory_exponent": exponent(areas, memory),
        "cost": stated_cost(model),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
    }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p of values ~ sizes^p: the slope of the line nearest to their logarithms by least squares."""
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope


def stated_cost(model: str) -> str:
    """What the system's own docstring says after "Cost:"."""
    if model == YARDSTICK:
        return "quadratic in tokens"
    module = importlib.import_module(f"vitarium.backbones.{find_model(model)[0].slug}")
    found = re.search(r"^Cost: (.*)$", inspect.getdoc(module) or "", re.MULTILINE)
    return found[1].rstrip(".") if found else ""


def run(cells: Sequence[Cell], results: Results, rounds: int, until: float) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Measure, one cell after another; models are built once for their neighbours. Stops before a cell that begins after `until`."""
    rulers: dict[str, nn.Module] = {}
    for (model, dtype, scaling), group in itertools.groupby(cells, lambda c: (c.model, c.dtype, c.kind == SCALING)):
        contest: Contest | None = None
        graphs: Graphs | None = None
        for cell in group:
            if time.monotonic() > until:
                return
            try:
                if scaling:
                    row = grow(model, dtype, cell.device, max(3, rounds - 2))
                else:
                    if contest is None:
                        contest, remark = open_contest(model, dtype, cell.device)
                    if cell.kind in GRAPHS:
                        graphs = graphs or Graphs(contest)
                        row = graphs.measure(cell.kind, cell.batch, rounds) | {"remark": remark}
                    else:
                        if dtype not in rulers:
                            rulers[dtype] = vitarium.create_model(YARDSTICK).to(cell.device, getattr(torch, dtype)).eval()
                        ruler = dict(yardstick=rulers[dtype], yardstick_name=YARDSTICK)
                        row = measure(contest, cell.kind, cell.batch, rounds=rounds, **ruler).to_dict() | {"remark": remark}
            except Exception as error:  # one that fails must not stop the others
                row = {"failed": first_line(error)}
            results.add(cell, row)
            yield cell, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="default: one of each system")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, SCALING])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each arm (two fewer for growth)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no measurement after so many")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--again", action="store_true", help="measure also what the file has")
    parser.add_argument("--list", action="store_true", help="only say what would be measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    deployed = bool(options.kinds) and set(options.kinds) <= set(GRAPHS)
    models = options.models or (list(EXPORTED) if deployed else default_models())
    cells = plan(models, options.device)
    if options.kinds or options.dtypes or options.batches:
        product = options.kinds or ["inference"], options.dtypes or ["float32"], options.batches or [1, 8]
        cells = chosen(models, *product, options.device)
    results = Results(options.output)
    todo = cells if options.again else results.missing(cells)
    print(f"{len(todo)} of {len(cells)} measurements to make", flush=True)
    if options.list:
        print(*(f"{cell.model} {cell.kind} {cell.dtype} {cell.batch}" for cell in todo), sep="\n")
        return
    start = time.monotonic()
    for cell, row in run(todo, results, options.rounds, start + 60 * options.minutes):
        print(f"{time.monotonic() - start:5.0f} s  {cell.model:20} {cell.kind:10} {cell.dtype:9} {cell.batch}  {told(row)}", flush=True)


def told(row: dict[str, Any]) -> str:
    """A row in a line."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    if "cost" in row:
        sizes = ", ".join(f"{side}: {ms:.0f} ms {mb:.0f} MB" for side, ms, mb in zip(row["image_sizes"], row["ms"], row["mb"], strict=True))
        return f"time area^{row['time_exponent']:.2f}, memory area^{row['memory_exponent']:.2f} ({sizes})"
    if "nodes" in row:
        spread = ", ".join(f"{k} {row[k]:.3f} [{row[f'{k}_low']:.2f}, {row[f'{k}_high']:.2f}]" for k in ("ratio", "aa"))
        return f"{row['ours_ms']:.0f} ms, {spread}, {sum(row['nodes']['ours'].values())} nodes, peer {sum(row['nodes']['peer'].values())}"
    beside = f", {row['verdict']} ({row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}])" if row["ratio"] else ""
    aa = f"ours/ours {row['aa']:.2f} [{row['aa_low']:.2f}, {row['aa_high']:.2f}]"
    return f"{row['ours_ms']:.1f} ms, {100 * row['share']:.0f} % of the ViT's rate{beside}, {aa} {row['peer']} {row['remark']}"


if __name__ == "__main__":
    main()
