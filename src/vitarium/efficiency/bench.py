"""Ours against the best public implementation of the same model, on equal weights, in one run.

A machine's speed drifts by tens of percent within minutes, so nothing is timed alone: in each round every arm runs once, in changing order,
and what counts is the median of the rounds' ratios. A second copy of our model runs along; where the ratio to the peer lies inside the
spread of ours against ours, there is no verdict. Outputs are proven equal before anything is timed.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import Family, create_model, find_model
from vitarium.efficiency.profiler import count_macs, count_params, example_image, weight_bytes
from vitarium.errors import UsageError

Kind = Literal["inference", "training", "compiled"]
KINDS: tuple[Kind, ...] = ("inference", "training", "compiled")


@dataclass(frozen=True)
class Row:
    """One model in one setting.

    Attributes:
        model, peer: what was timed; `peer` is "" where no public peer is known.
        kind: "inference", "training" (forward and backward) or "compiled" (inference under torch.compile).
        batch, image_size, dtype, device, threads: the setting.
        params, bytes, macs: of our model; macs of one image.
        error: largest difference of the logits over the peer's standard deviation, in this dtype.
        ours_ms, peer_ms: medians, milliseconds a call: processor time on a CPU, time between synchronisations elsewhere.
        ratio, ratio_low, ratio_high: peer's time over ours, round by round: median, least, most. Above 1: ours is faster.
        aa, aa_low, aa_high: the same for a second copy of ours.
        load: processes waiting for a processor, average of the last minute, at the end.
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

    @property
    def verdict(self) -> str:
        """In words: "1.20x faster", "1.10x slower", "no difference beyond the noise", or "" without a peer."""
        if self.ratio is None:
            return ""
        if abs(self.ratio - 1) <= max(abs(self.aa_low - 1), abs(self.aa_high - 1), abs(self.aa - 1)):
            return "no difference beyond the noise"
        return f"{self.ratio:.2f}x faster" if self.ratio > 1 else f"{1 / self.ratio:.2f}x slower"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
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
) -> Iterator[Row]:
    """Time models, each beside its peer. Yields a row as soon as it is measured.

    Args:
        models: names of ours.
        peers: whether to time the peer as well.
        kinds: any of "inference", "training", "compiled".
        batches: images a call; training takes the largest.
        image_size: side, pixels; by default what each variant was made for.
        dtype: float32, bfloat16 or float16, for weights and image.
        device: "cpu", "cuda", ...
        rounds: at least 3; 7 resolve about 5 % on a noisy machine.
        threads: of PyTorch on a CPU; more than the free cores slow everything down.

    Raises:
        UsageError: an option out of range, or a model that is not ours.
        RuntimeError: outputs differ from the peer's beyond rounding.
    """
    if rounds < 3:
        raise UsageError(f"rounds must be at least 3, got {rounds}")
    if wrong := [k for k in kinds if k not in KINDS]:
        raise UsageError(f"unknown kind {wrong[0]!r}; there are {', '.join(KINDS)}")
    found = [find_model(name) for name in models]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, (family, variant) in zip(models, found, strict=True):
            size = image_size or family.preprocessing(variant).image_size
            peer_name = peer_of(family, variant) if peers else ""
            ours, peer = _pair(name, family, peer_name, size, dtype, device)
            error = _difference(ours, peer, size) if peer is not None else None
            for kind in kinds:
                for batch in (max(batches),) if kind == "training" else batches:
                    yield _row(name, peer_name, kind, batch, size, ours, peer, error, rounds)
    finally:
        torch.set_num_threads(before)


def peer_of(family: Family, variant: str) -> str:
    """The public implementation that a variant is timed against, "timm/NAME", or "" where none is known: the one its weights come from."""
    sources = [source for tag in family.weights.get(variant, {}).values() for source in tag]
    names = [source.removeprefix("timm:").partition(".")[0] for source in sources if source.startswith("timm:")]
    return f"timm/{names[0]}" if names else ""


def _pair(name: str, family: Family, peer_name: str, size: int, dtype: torch.dtype, device: str) -> tuple[nn.Module, nn.Module | None]:
    """Our model and its peer with the peer's random weights in both; without stochastic depth, whose defaults differ."""
    ours = create_model(name, image_size=size, drop_path_rate=0.0)
    if not peer_name:
        return ours.to(device, dtype).eval(), None
    torch.manual_seed(0)
    peer = create_model(peer_name, image_size=size, drop_path_rate=0.0)
    with torch.no_grad():
        for parameter in peer.parameters():  # away from the initial zeros of layer scales and biases
            parameter.add_(0.02 * torch.randn_like(parameter))
    ours.load_state_dict(family.dialects["timm"](peer.state_dict()))
    return ours.to(device, dtype).eval(), peer.to(device, dtype).eval()


def _difference(ours: nn.Module, peer: nn.Module, size: int) -> float:
    image = example_image(ours, size, 2)
    with torch.inference_mode():
        a, b = ours(image).double(), peer(image).double()
    error = ((a - b).abs().max() / b.std()).item()
    limit = 1e-3 if image.dtype is torch.float32 else 0.2
    if not error < limit:
        raise RuntimeError(f"outputs differ from the peer's by {error:.2g} standard deviations (at most {limit:g}): nothing is timed")
    return error


def _row(
    name: str, peer_name: str, kind: Kind, batch: int, size: int, ours: nn.Module, peer: nn.Module | None, error: float | None, rounds: int
) -> Row:
    arms = {"ours": ours, "again": copy.deepcopy(ours)} | ({"peer": peer} if peer is not None else {})
    image = example_image(ours, size, batch)
    calls = {arm: _call(model, image, kind) for arm, model in arms.items()}
    times = paired(calls, rounds=rounds, device=image.device)
    ratios = [p / o for p, o in zip(times["peer"], times["ours"], strict=True)] if peer is not None else None
    same = [a / o for a, o in zip(times["again"], times["ours"], strict=True)]
    return Row(
        model=name,
        peer=peer_name,
        kind=kind,
        batch=batch,
        image_size=size,
        dtype=str(image.dtype).removeprefix("torch."),
        device=image.device.type,
        threads=torch.get_num_threads(),
        params=count_params(ours),
        bytes=weight_bytes(ours),
        macs=count_macs(ours, size),
        error=error,
        ours_ms=1e3 * statistics.median(times["ours"]),
        peer_ms=1e3 * statistics.median(times["peer"]) if ratios else None,
        ratio=statistics.median(ratios) if ratios else None,
        ratio_low=min(ratios) if ratios else None,
        ratio_high=max(ratios) if ratios else None,
        aa=statistics.median(same),
        aa_low=min(same),
        aa_high=max(same),
        rounds=rounds,
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
    )


def _call(model: nn.Module, image: Tensor, kind: Kind) -> Callable[[], Any]:
    if kind == "training":
        model.train()
        target = torch.zeros(len(image), dtype=torch.long, device=image.device)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(image), target).backward()

        return step
    model.eval()
    run = torch.compile(model) if kind == "compiled" else model

    def forward() -> None:
        with torch.inference_mode():
            run(image)

    return forward


def paired(
    calls: dict[str, Callable[[], Any]], *, rounds: int, device: torch.device | str = "cpu", least_seconds: float = 0.4
) -> dict[str, list[float]]:
    """Seconds a call, for each arm and round. Arms take turns, in an order that turns with the round.

    Args:
        calls: the arms.
        rounds: turns of each arm, after one that is not counted.
        device: where the work is done; on a CPU the process's processor time is taken, which other processes disturb less.
        least_seconds: an arm's turn repeats its call until about this much time is measured.
    """
    device = torch.device(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def turn(call: Callable[[], Any], repeats: int) -> float:
        _synchronize(device)
        start = clock()
        for _ in range(repeats):
            call()
        _synchronize(device)
        return (clock() - start) / repeats

    for call in calls.values():  # caches, kernel choice, compilation
        call()
    repeats = max(1, round(least_seconds / max(turn(next(iter(calls.values())), 1), 1e-6)))
    times: dict[str, list[float]] = {arm: [] for arm in calls}
    names = list(calls)
    for i in range(rounds):
        for arm in (*names[i % len(names) :], *names[: i % len(names)]):
            times[arm].append(turn(calls[arm], repeats))
    return times


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
