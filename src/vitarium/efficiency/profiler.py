"""Cost of a model: parameters, bytes, multiply-accumulates, time, memory. Counted where possible, timed otherwise.

    profile(model, 224).latency_ms

MACs are half the count of torch's flop counter on the operations that run, fused attention included, so that skipped work is measured.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitarium.catalog import calling
from vitarium.catalog.calling import call, example_inputs
from vitarium.errors import UsageError
from vitarium.nn.modes import evaluating, frozen_parameters
from vitarium.ops.flops import flop_counter

WARM_UP = 2  # warm-up runs, which fill allocators and caches and select kernels


@dataclass(frozen=True)
class Profile:
    """Cost of inference. MB are 10^6 bytes.

    Args:
        params: number of parameters.
        bytes: size of parameters and buffers in memory.
        macs: multiply-accumulates for one sample.
        latency_ms: milliseconds for one sample at batch 1 (median).
        throughput: samples per second at the given batch (median).
        peak_memory_mb: peak memory of a forward pass at that batch: weights, inputs and activations.
    """

    params: int
    bytes: int
    macs: int
    latency_ms: float
    throughput: float
    peak_memory_mb: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields as a dictionary for JSON."""
        return asdict(self)


def profile(
    model: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    *,
    batch: int = 1,
    device: str | torch.device | None = None,
    runs: int = 10,
) -> Profile:
    """Measure a model in evaluation mode, without gradients. Its mode and its device are as before afterwards.

    Args:
        model: any model that `vitarium.catalog.calling.example_inputs` supports.
        image_size: side, or (height, width), in pixels; by default the model's native size.
        batch: samples at once, for throughput and memory.
        device: where to measure; the model's own by default.
        runs: timed forward passes at batch 1; a third as many (at least three) at `batch`.

    Raises:
        UsageError: batch or runs below 1, a model on the meta device, which cannot be timed, or one whose inputs are unknown.
    """
    if batch < 1 or runs < 1:
        raise UsageError(f"batch and runs must be at least 1, got batch={batch} and runs={runs}")
    with _measured(model, device):
        one = example_inputs(model, 1, image_size)
        where = device_of(one)
        if where.type == "meta":
            raise UsageError("a model on the meta device has no weights to time; use count_macs, or create it on a real device")
        many = one if batch == 1 else example_inputs(model, batch, image_size)
        peak = peak_memory(model, many)
        seconds = _median_seconds(lambda: call(model, one), where, runs)
        together = seconds if batch == 1 else _median_seconds(lambda: call(model, many), where, max(3, runs // 3))
        return Profile(
            params=count_params(model),
            bytes=weight_bytes(model),
            macs=count_macs(model, image_size),
            latency_ms=1e3 * seconds,
            throughput=batch / together,
            peak_memory_mb=peak / 1e6,
        )


def count_params(model: nn.Module) -> int:
    """Return the number of parameters; a shared one counts once."""
    return sum(p.numel() for p in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes that parameters and buffers take in memory."""
    return sum(t.numel() * t.element_size() for t in _weights(model))


def count_macs(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> int:
    """Return the multiply-accumulates of one sample through the model, as torch counts. Works on the meta device, without arithmetic.

    Raises:
        UsageError: the model's inputs are unknown, or it does not accept the size.
    """
    with _measured(model), flop_counter() as counter:
        call(model, example_inputs(model, 1, image_size))
    return counter.get_total_flops() // 2


def peak_memory(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> int:
    """Return the peak memory of a forward pass in bytes: weights, inputs and activations.

    On CUDA it is the allocator's own peak. Elsewhere it is the peak sum of live tensors that operations create, which is equal on every
    system and excludes kernels' private workspace.

    Args:
        model: any module.
        inputs: by name (`vitarium.catalog.calling.example_inputs`), or one image (B, C, H, W), on the model's device.
    """
    given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    device = given[0].device
    with _measured(model):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            call(model, inputs)
            torch.cuda.synchronize(device)
            own = weight_bytes(model) + sum(leaf.nbytes for leaf in given)
            return own + torch.cuda.max_memory_allocated(device) - before
        with _LiveBytes([*_weights(model), *given]) as live:
            call(model, inputs)
        return live.peak


def example_image(model: nn.Module, image_size: int | tuple[int, int], batch: int = 1) -> Tensor:
    """Return `vitarium.catalog.calling.example_image`, for a model that is called with one image (batch, C, H, W) or one clip."""
    return calling.example_image(model, batch, image_size)


def device_of(inputs: Mapping[str, Any]) -> torch.device:
    """Return the device of the first tensor among a call's inputs."""
    return next(leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


def _weights(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _median_seconds(call: Callable[[], Any], device: torch.device, runs: int) -> float:
    times = []
    for i in range(WARM_UP + runs):
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        if i >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextlib.contextmanager
def _measured(model: nn.Module, device: str | torch.device | None = None) -> Iterator[None]:
    """Switch to evaluation mode without gradients, on another device if given, and back."""
    home = next(iter(_weights(model)), torch.empty(0)).device
    try:
        if device is not None:
            model.to(device)
        # torch's flop counter fails on a module that is passed a parameter without a gradient function
        with frozen_parameters(model), evaluating(model, inference=True):
            yield
    finally:
        if device is not None:
            model.to(home)


class _LiveBytes(TorchDispatchMode):
    """Sum of the storages alive while operations run; `peak` is its largest value in bytes."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()
        self._watch(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._watch(tree_leaves((args, result)))  # arguments too: caches of a module count as well
        return result

    def _watch(self, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                key = storage._cdata
                if key not in self._seen:
                    self._seen.add(key)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, key, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size
