"""Cost of a model: parameters, bytes, multiply-accumulates, time, memory. Counted where possible, timed otherwise.

    profile(model, 224).latency_ms

MACs are half of what torch's flop counter counts in the graph that really runs, fused attention included, so skipped work is measured, not
assumed.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vitarium.errors import UsageError
from vitarium.nn.modes import evaluating, frozen_parameters

WARM_UP = 2  # runs before timing, which fill allocators and caches and choose kernels


@dataclass(frozen=True)
class Profile:
    """Cost of inference. MB are 10^6 bytes.

    Args:
        params: number of parameters.
        bytes: size of parameters and buffers in memory.
        macs: multiply-accumulates for one image.
        latency_ms: milliseconds for one image at batch 1 (median).
        throughput: images per second at the given batch (median).
        peak_memory_mb: largest memory alive at once in a forward pass at that batch: weights, image and activations.
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
    model: nn.Module, image_size: int | tuple[int, int], *, batch: int = 1, device: str | torch.device | None = None, runs: int = 10
) -> Profile:
    """Measure a model in eval mode, without gradients. Its mode and device are restored.

    Args:
        model: takes an image (B, C, H, W) of the dtype of its weights.
        image_size: side, or (height, width), in pixels.
        batch: number of images, for throughput and memory.
        device: by default the model's own.
        runs: timed forward passes at batch 1; a third as many (at least three) at `batch`.

    Raises:
        UsageError: batch or runs below 1, or a model on the meta device, which cannot be timed.
    """
    if batch < 1 or runs < 1:
        raise UsageError(f"batch and runs must be at least 1, got batch={batch} and runs={runs}")
    with _measured(model, device):
        one = example_image(model, image_size)
        if one.is_meta:
            raise UsageError("a model on the meta device has no weights to time; use count_macs, or create it on a real device")
        many = one if batch == 1 else example_image(model, image_size, batch)
        peak = peak_memory(model, many)
        seconds = _median_seconds(lambda: model(one), one.device, runs)
        together = seconds if batch == 1 else _median_seconds(lambda: model(many), one.device, max(3, runs // 3))
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
    """Return the bytes of parameters and buffers in memory."""
    return sum(t.numel() * t.element_size() for t in _weights(model))


def count_macs(model: nn.Module, image_size: int | tuple[int, int]) -> int:
    """Return the multiply-accumulates of one image, as torch counts them. Works on the meta device, without arithmetic."""
    with _measured(model), FlopCounterMode(display=False) as counter:
        model(example_image(model, image_size))
    return counter.get_total_flops() // 2


def peak_memory(model: nn.Module, image: Tensor) -> int:
    """Return the peak of bytes alive in a forward pass: weights, image and activations.

    On CUDA it is the allocator's own peak. Elsewhere it is the sum of the tensors that operations create, followed while alive:
    the same on every system, and without the private scratch space of a kernel.

    Args:
        image: (B, C, H, W) on the model's device.
    """
    with _measured(model):
        if image.device.type == "cuda":
            torch.cuda.synchronize(image.device)
            torch.cuda.reset_peak_memory_stats(image.device)
            before = torch.cuda.memory_allocated(image.device)
            model(image)
            torch.cuda.synchronize(image.device)
            return weight_bytes(model) + image.nbytes + torch.cuda.max_memory_allocated(image.device) - before
        with _LiveBytes([*_weights(model), image]) as live:
            model(image)
        return live.peak


def example_image(model: nn.Module, image_size: int | tuple[int, int], batch: int = 1) -> Tensor:
    """Return a random image (batch, C, H, W), or clip (batch, C, T, H, W), of a model's channels, dtype and device; always the same one."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    preprocessing = getattr(model, "preprocessing", None)
    channels = preprocessing.channels if preprocessing is not None else getattr(model, "in_chans", 3)
    weight = next((w for w in _weights(model) if w.is_floating_point()), torch.empty(0))
    frames = [preprocessing.frames] if getattr(preprocessing, "frames", None) else []
    image = torch.randn(batch, channels, *frames, height, width, generator=torch.Generator().manual_seed(0), device="cpu")
    return image.to(weight.device, weight.dtype)


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
        # torch's flop counter fails on a module that gets a parameter without a gradient function
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
        self._watch(tree_leaves((args, result)))  # arguments too: a module's caches are memory as well
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
