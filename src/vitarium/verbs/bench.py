"""Time models beside the best public implementations of the same models."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitarium.errors import UsageError, nearest
from vitarium.numbers import short
from vitarium.training.tasks.base import TableData
from vitarium.verbs.opening import find_device
from vitarium.verbs.result import Result

if TYPE_CHECKING:
    import torch

    from vitarium.efficiency.bench import Kind, Row

COLUMNS = ["~model", "~peer", "kind", ">batch", ">ours", ">peer", ">peer / ours", ">ours / ours", "verdict"]
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(repr=False)
class Benchmark(Result):
    """Times of models and their peers.

    Attributes:
        rows: one per model, kind and batch size; see `vitarium.efficiency.bench.Row`.
    """

    rows: list[Row]

    def facts(self) -> dict[str, Any]:
        return {"models": ", ".join(dict.fromkeys(row.model for row in self.rows)), "measurements": len(self.rows)}

    def tables(self) -> list[TableData]:
        return [TableData("", list(COLUMNS), [cells(row) for row in self.rows])]

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [row.to_dict() for row in self.rows]}


def bench(
    models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    peers: bool = True,
    kind: Kind | Sequence[Kind] | None = None,
    runtime: str | Sequence[str] | None = None,
    batch: int | Sequence[int] = (1, 8),
    image_size: int | None = None,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    rounds: int = 7,
    threads: int = 1,
    compile_limit: float = 240.0,
    progress: Callable[[Row], Any] = lambda row: None,
) -> Benchmark:
    """Time models beside their peers: equal weights, outputs checked to be equal, turns interleaved, no verdict within the noise.

    Args:
        models: names: ours, "timm/NAME", "hf/OWNER/NAME" or "hf/./folder"; or files of `vitarium.save`. Only our names have a peer.
        peers: time the peers too.
        kind: what to time: "inference" (forward), "training" (forward and backward), "compiled" (forward under torch.compile),
            "onnxruntime", "openvino" (forward of the exported graph); one or several. None: the runtimes, else inference and training.
        runtime: the same forward passes by the names of the runtimes (`vitarium.efficiency.runtimes`): "eager", "compile",
            "onnxruntime", "openvino"; one or several. The peer is executed by the same one.
        batch: images per call, one number or several; training takes the largest.
        image_size: side of the image, pixels; None: each model's native size.
        dtype: of weights and image: float32, bfloat16 or float16.
        device: "auto", "cpu", "cuda", ...
        rounds: turns of each arm, at least 3; 7 resolve about 5 % on a noisy machine.
        threads: of PyTorch on a CPU; more than there are free cores slow everything down.
        compile_limit: seconds after which the compilation of a model is given up (on POSIX, in the main thread).
        progress: called with each row when it is measured.

    Raises:
        UsageError: unknown model, kind, dtype or device, an option out of range, or a compilation that did not finish.
        OutputsDiffer: the outputs differ from the peer's, beyond rounding.
    """
    import torch

    from vitarium.efficiency.bench import bench as run

    kinds = kinds_of(kind, runtime)
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}{nearest(name, DTYPES)} (accepted: {', '.join(DTYPES)})")
    names = [os.fspath(name) for name in ([models] if isinstance(models, str | os.PathLike) else models)]
    batches = [batch] if isinstance(batch, int) else list(batch)
    if not names:
        raise UsageError("no models to time; give names such as swin_tiny ('vitarium models' lists ours)")
    if not batches or min(batches) < 1:
        raise UsageError(f"batch must be numbers from 1 up, got {batches}")
    measured = run(
        names,
        peers=peers,
        kinds=kinds,
        batches=batches,
        image_size=image_size,
        dtype=getattr(torch, name),
        device=str(find_device(device)),
        rounds=rounds,
        threads=threads,
        compile_limit=compile_limit,
    )
    rows = []
    for row in measured:
        rows.append(row)
        progress(row)
    return Benchmark(rows)


def kinds_of(kind: Kind | Sequence[Kind] | None, runtime: str | Sequence[str] | None) -> list[Kind]:
    """Return the kinds to time, each once; arguments as for `bench`.

    Raises:
        UsageError: unknown runtime.
    """
    from vitarium.efficiency.bench import KIND_OF
    from vitarium.efficiency.runtimes import check_runtime

    runtimes = [runtime] if isinstance(runtime, str) else list(runtime or ())
    for name in runtimes:
        check_runtime(name)
    given: list[Any] = [kind] if isinstance(kind, str) else list(kind or ())
    return list(dict.fromkeys([*given, *(KIND_OF[name] for name in runtimes)])) or ["inference", "training"]


def cells(row: Row) -> list[str]:
    """Return a measurement as the cells of `COLUMNS`."""
    return [
        f"{row.model} ({short(row.params)}, {short(row.macs)} MACs)",
        row.peer or "-",
        row.kind,
        str(row.batch),
        f"{row.ours_ms:.2f} ms",
        "-" if row.peer_ms is None else f"{row.peer_ms:.2f} ms",
        spread(row.ratio, row.ratio_low, row.ratio_high),
        spread(row.aa, row.aa_low, row.aa_high),
        row.verdict,
    ]


def spread(median: float | None, low: float | None, high: float | None) -> str:
    """Return "1.20 [1.15, 1.31]"."""
    return "-" if median is None else f"{median:.2f} [{low:.2f}, {high:.2f}]"
