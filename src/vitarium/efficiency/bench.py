"""Paired benchmark of our models against the best public implementation of the same model, on equal weights, in one run.

A machine's speed drifts by tens of percent within minutes, so no arm is timed alone: in each round every arm runs once, in changing order,
and the result is the median of the rounds' ratios. A second copy of our model runs along; if the ratio to the peer lies inside the spread
of ours against ours, there is no verdict. Outputs are checked to be equal before anything is timed. Inference runs after `fuse()`; training
does not fuse.
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import find_model
from vitarium.catalog.calling import Inputs, arguments, example_inputs
from vitarium.catalog.create import preprocessing_of
from vitarium.catalog.foreign import is_foreign
from vitarium.efficiency.contest import Contest, Forward, OutputsDiffer, floating, peer_of, prepare
from vitarium.efficiency.limits import time_limit
from vitarium.efficiency.profiler import count_macs, count_params, device_of, weight_bytes
from vitarium.efficiency.runtimes import GRAPHS, check_runtime
from vitarium.efficiency.runtimes.sessions import open_session
from vitarium.efficiency.timing import paired
from vitarium.errors import InputError, UsageError
from vitarium.files import is_model_file

__all__ = ["KINDS", "KIND_OF", "Contest", "Kind", "OutputsDiffer", "Row", "bench", "measure", "paired", "peer_of", "prepare"]

Kind = Literal["inference", "training", "compiled", "onnxruntime", "openvino"]
KINDS: tuple[Kind, ...] = ("inference", "training", "compiled", "onnxruntime", "openvino")
KIND_OF: dict[str, Kind] = {"eager": "inference", "compile": "compiled", "onnxruntime": "onnxruntime", "openvino": "openvino"}
"""The kind that times inference in each of `vitarium.efficiency.runtimes.RUNTIMES`."""


@dataclass(frozen=True)
class Row:
    """Result for one model in one setting.

    Attributes:
        model, peer: names; `peer` is "" if no public peer is known.
        kind: "inference", "training" (forward and backward), "compiled" (inference under torch.compile), "onnxruntime" or "openvino"
            (inference of the exported graph, on the CPU).
        batch, image_size, dtype, device, threads: the setting.
        params, bytes, macs: of our model before it is fused; macs for one image.
        error: largest difference of the logits over the peer's standard deviation, in this dtype.
        ours_ms, peer_ms: medians in milliseconds per call: processor time on a CPU, time between synchronisations elsewhere.
        ratio, ratio_low, ratio_high: peer's time over ours, over the rounds: median, least, most. Above 1: ours is faster.
        aa, aa_low, aa_high: the same for a second copy of our model.
        load: processes waiting for a processor, average of the last minute, at the end.
        yardstick, yardstick_ms: a reference model timed in the same rounds, such as a plain ViT; "" for none.
        share, share_low, share_high: our multiply-accumulates per second over the yardstick's, over the rounds: median, least, most.
        peer_share: the peer's, median, for the same work.
    """

    model: str
    peer: str
    kind: Kind
    batch: int
    image_size: int
    dtype: str
    device: str
    threads: int
    params: int
    bytes: int
    macs: int
    error: float | None
    ours_ms: float
    peer_ms: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    aa: float
    aa_low: float
    aa_high: float
    rounds: int
    load: float
    yardstick: str = ""
    yardstick_ms: float | None = None
    share: float | None = None
    share_low: float | None = None
    share_high: float | None = None
    peer_share: float | None = None

    @property
    def verdict(self) -> str:
        """Verdict: "1.20x faster", "1.10x slower", "no difference beyond the noise", or "" without a peer."""
        if self.ratio is None:
            return ""
        if abs(self.ratio - 1) <= max(abs(self.aa_low - 1), abs(self.aa_high - 1), abs(self.aa - 1)):
            return "no difference beyond the noise"
        return f"{self.ratio:.2f}x faster" if self.ratio > 1 else f"{1 / self.ratio:.2f}x slower"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary for JSON."""
        return asdict(self) | {"verdict": self.verdict}


def bench(
    models: Sequence[str],
    *,
    peers: bool = True,
    kinds: Sequence[Kind] = ("inference", "training"),
    batches: Sequence[int] = (1, 8),
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rounds: int = 7,
    threads: int = 1,
    compile_limit: float = 240.0,
) -> Iterator[Row]:
    """Time models, each beside its peer, and yield each row when it is measured.

    Args:
        models: names: ours, "timm/NAME", "hf/OWNER/NAME" or "hf/./folder"; or files of `vitarium.save`. Only our names have a peer.
        peers: whether to time the peer as well.
        kinds: any of `KINDS`.
        batches: images per call; training takes the largest.
        image_size: side in pixels; by default the native size of each variant.
        dtype: of weights and image: float32, bfloat16 or float16.
        device: "cpu", "cuda", ...
        rounds: at least 3; 7 resolve about 5 % on a noisy machine.
        threads: number of PyTorch's threads on a CPU; more than the free cores slow everything down.
        compile_limit: seconds after which the compilation of a model is given up (on POSIX, in the main thread).

    Raises:
        UsageError: an option out of range, an unknown model, or a compilation that did not finish.
        OutputsDiffer: the outputs differ from the peer's, beyond rounding.
    """
    if rounds < 3:
        raise UsageError(f"rounds must be at least 3, got {rounds}")
    if wrong := [k for k in kinds if k not in KINDS]:
        raise UsageError(f"unknown kind {wrong[0]!r} (accepted: {', '.join(KINDS)})")
    for kind in kinds:
        if kind in GRAPHS:
            check_runtime(kind)
    for name in models:
        if not is_foreign(name) and not is_model_file(name):
            find_model(name)
    for name in models:
        contest = prepare(name, peers=peers, image_size=image_size, dtype=dtype, device=device)
        if "training" in kinds:
            check_trains(contest.trained, name)
        for kind in kinds:
            for batch in (max(batches),) if kind == "training" else batches:
                yield measure(contest, kind, batch, rounds=rounds, threads=threads, compile_limit=compile_limit)


def check_trains(model: nn.Module, name: str) -> None:
    """Refuse to time the training of a quantized model.

    Raises:
        UsageError: it has quantized layers, which have no gradients.
    """
    from vitarium.efficiency.quantization.layers import QuantizedLayer

    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise UsageError(f"{name} has quantized layers, which do not train; time it with --kind inference")


def measure(
    contest: Contest,
    kind: Kind,
    batch: int,
    *,
    rounds: int = 7,
    threads: int = 1,
    yardstick: nn.Module | None = None,
    yardstick_name: str = "",
    compile_limit: float = 240.0,
) -> Row:
    """Time our model, a second copy of it, the peer (not a function in training) and the yardstick, in turns.

    Args:
        yardstick: another model of the same dtype and device, at the image size of its preprocessing; our rate is given relative to its.
        The others as for `bench`.
    """
    ours, size = contest.trained if kind == "training" else contest.ours, contest.image_size
    plain = kind in ("inference", "compiled")
    peer = contest.peer if plain or isinstance(contest.peer, nn.Module) else None
    arms: dict[str, nn.Module | Forward] = {"ours": ours, "again": ours if kind in GRAPHS else copy.deepcopy(ours)}
    arms |= {"peer": peer} if peer is not None else {}
    inputs = example_inputs(ours, batch, size)
    given, macs, work = dict.fromkeys(arms, inputs), count_macs(contest.trained, size), 1.0
    if yardstick is not None:
        its_size = preprocessing_of(yardstick).image_size
        arms["yardstick"], given["yardstick"] = yardstick, example_inputs(yardstick, batch, its_size)
        work = macs / count_macs(yardstick, its_size)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.compiler.reset()  # otherwise many models in one process reach the recompilation limit and run eagerly
    try:
        if kind in GRAPHS:
            calls = {arm: _graph_call(contest.graph_of(model), given[arm], kind, threads) for arm, model in arms.items()}  # type: ignore[arg-type]
        else:
            calls = {arm: _call(model, given[arm], kind) for arm, model in arms.items()}
        if kind == "compiled":
            _compile(calls, contest, compile_limit)
        times = paired(calls, rounds=rounds, device=device_of(inputs))
    finally:
        torch.set_num_threads(before)
    ratio, again = _ratios(times, "peer", "ours"), _ratios(times, "again", "ours")
    share, peer_share = ([work * r for r in _ratios(times, "yardstick", arm)] for arm in ("ours", "peer"))
    milliseconds = {arm: 1e3 * statistics.median(seconds) for arm, seconds in times.items()}
    return Row(
        model=contest.model,
        peer=contest.peer_name if peer is not None else "",
        kind=kind,
        batch=batch,
        image_size=size,
        dtype=str(dtype_of(ours)).removeprefix("torch."),
        device=device_of(inputs).type,
        threads=threads,
        params=count_params(contest.trained),
        bytes=weight_bytes(contest.trained),
        macs=macs,
        error=contest.error,
        ours_ms=milliseconds["ours"],
        peer_ms=milliseconds.get("peer"),
        **_spread("ratio", ratio),
        **_spread("aa", again),
        rounds=rounds,
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
        yardstick=yardstick_name if yardstick is not None else "",
        yardstick_ms=milliseconds.get("yardstick"),
        **_spread("share", share),
        peer_share=statistics.median(peer_share) if peer_share else None,
    )


def _compile(calls: dict[str, Callable[[], Any]], contest: Contest, limit: float) -> None:
    """Call every arm once, which compiles it.

    Raises:
        UsageError: one did not finish within the limit, in seconds.
    """
    for arm, run in calls.items():
        try:
            with time_limit(limit):
                run()
        except TimeoutError as late:
            torch.compiler.reset()
            name = contest.peer_name if arm == "peer" else contest.model
            raise UsageError(
                f"torch.compile of {name}: {late}; --compile-limit SECONDS raises the limit, or leave --kind compiled out"
            ) from late


def _ratios(times: dict[str, list[float]], above: str, below: str) -> list[float]:
    """Return the ratios, round by round; empty if one of the arms did not run."""
    return [a / b for a, b in zip(times.get(above, []), times.get(below, []), strict=False)]


def _spread(name: str, values: list[float]) -> dict[str, Any]:
    """Return median, least and most; None for no values."""
    found = (statistics.median(values), min(values), max(values)) if values else (None, None, None)
    return dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))


def _call(model: nn.Module | Forward, inputs: Inputs, kind: Kind) -> Callable[[], Any]:
    """One call of an arm. Arguments are positional, since a peer may use other names."""
    args, named = tuple(inputs.values()), Inputs()
    if isinstance(model, nn.Module):
        with contextlib.suppress(InputError):
            args, named = arguments(model, inputs)
    if kind == "training":
        assert isinstance(model, nn.Module)
        module = model.train()

        def step() -> None:
            module.zero_grad(set_to_none=True)
            _objective(module(*args, **named)).backward()

        return step
    if isinstance(model, nn.Module):
        model.eval()
    run = torch.compile(model) if kind == "compiled" else model

    def forward() -> None:
        with torch.inference_mode():
            run(*args, **named)

    return forward


def _graph_call(content: bytes, inputs: Inputs, runtime: str, threads: int) -> Callable[[], Any]:
    """One call of an exported graph, opened for this arm alone."""
    session, values = open_session(runtime, content, threads), [value.numpy() for value in inputs.values()]
    return lambda: session(*values)


def _objective(output: Any) -> Tensor:
    """Return a loss for timing: cross entropy of logits (B, classes), else the mean square of all outputs."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return F.cross_entropy(output, output.new_zeros(len(output), dtype=torch.long))
    return torch.stack([t.float().square().mean() for t in floating(output) if t.requires_grad]).sum()


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's weights."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
