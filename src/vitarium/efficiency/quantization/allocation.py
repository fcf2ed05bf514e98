"""Greedy allocation of bits to layers, by the loss of accuracy per saved bit.

found = greedy_allocation(sizes, loss, target=5)       # any quantizer's layers, any measure of loss
found.bits                                             # {"blocks.0.attn.qkv": 6, ...}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vitarium.errors import UsageError


@dataclass
class Allocation:
    """Result of an allocation.

    Attributes:
        bits: number of bits of each layer.
        path: the steps, each as (layer, its bits after the step, loss after it, mean bits after it).
    """

    bits: dict[str, int]
    path: list[tuple[str, int, float, float]] = field(default_factory=list)


def greedy_allocation(
    sizes: Mapping[str, float],
    loss: Callable[[Mapping[str, int]], float],
    *,
    target: float,
    widths: tuple[int, int] = (4, 8),
    saved: Callable[[str, int], float] | None = None,
    fresh: int = 8,
) -> Allocation:
    """Lower one layer by one bit at a time until the mean is low enough.

    All layers start at the widest. The layer with the least (increase of the loss) / (saving of its bit) goes next. The losses depend on
    the other layers' bits; only the `fresh` most promising layers are measured again before each step.

    Args:
        sizes: layer -> its weight in the mean, such as its number of weights.
        loss: loss of an allocation, such as the divergence of the logits from the float model's; lower is better.
        target: mean bits, weighted by sizes.
        widths: narrowest and widest number of bits.
        saved: (layer, its bits) -> saving of one bit less; by default the layer's size.
        fresh: layers measured before each step.

    Raises:
        UsageError: the target is outside the widths.
    """
    narrowest, widest = widths
    if not narrowest <= target <= widest:
        raise UsageError(f"a mean of {target:g} bits cannot be reached with layers of {narrowest} to {widest} bits")
    bits = dict.fromkeys(sizes, widest)
    total = sum(sizes.values())
    result, now = Allocation(bits), loss(bits)
    known: dict[str, tuple[float, float]] = {}  # layer -> (score, loss), as last measured

    def measure(name: str) -> None:
        after = loss({**bits, name: bits[name] - 1})
        gain = sizes[name] if saved is None else saved(name, bits[name])
        known[name] = ((after - now) / gain, after)

    def mean() -> float:
        return sum(sizes[name] * width for name, width in bits.items()) / total

    for name in sizes:
        measure(name)
    stale: set[str] = set()
    while mean() > target + 1e-9:
        able = sorted((name for name in bits if bits[name] > narrowest), key=lambda name: known[name][0])
        for name in able[:fresh]:
            if name in stale:
                measure(name)
        best = min(able[:fresh], key=lambda name: known[name][0])
        bits[best] -= 1
        now = known[best][1]
        stale = set(bits)
        result.path.append((best, bits[best], now, mean()))
    return result
