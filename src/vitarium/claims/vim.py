"""Claim: bidirectional scans beat scans in one direction, and a scan's cost is linear in tokens where attention's is quadratic."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.claims import Arm, Comparison, Measured, claim
from vitarium.ops.attention import merge_heads, split_packed_heads

TOKENS = (1024, 4096)
DIM, HEADS, ROUNDS = 64, 4, 5


@claim(
    "vim",
    says="scans both ways beat as many scans one way; a scan's time and memory grow with the tokens, attention's with their square",
    minutes=3,
)
def compare() -> list[Comparison]:
    """Digits at 64 tokens with the class token in the middle: one scan each way against two scans forward, so that parameters, operations,
    data and steps are equal. Then time and peak memory of one mixer in inference at 1,024 and 4,096 tokens, beside attention that holds its
    matrix (as the paper compares; PyTorch's fused attention needs no such memory). Refuted if one direction is as good, if four times the
    tokens cost the scan six times as much or more, or if attention grows less than twice as fast as the scan."""
    sizes = dict(embed_dim=32, depth=2, patch_size=2)
    digits: dict[str, Any] = dict(model="vim_pico", steps=400, seeds=3)
    both = Arm("forward and backward", options=sizes, **digits)
    one = Arm("twice forward", options=sizes | {"directions": ("forward", "forward")}, **digits)
    time, memory = _time_growth(), _memory_growth()
    return [
        Comparison("both directions over one", both, one),
        Comparison("the scan's time grows with the tokens", Measured("6 / growth", [6 / s for s, _ in time], "x"), at_least=1.0),
        Comparison("attention's time grows faster", Measured("its growth / the scan's", [a / s for s, a in time], "x"), at_least=2.0),
        Comparison("the scan's memory grows with the tokens", Measured("6 / growth", [6 / memory[0]], "x"), at_least=1.0),
        Comparison("attention's memory grows faster", Measured("its growth / the scan's", [memory[1] / memory[0]], "x"), at_least=2.0),
    ]


class _MatrixAttention(nn.Module):
    """Multi-head attention with its matrix in memory, (B, N, DIM) -> (B, N, DIM)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_packed_heads(self.qkv(x), 3, HEADS)
        weights = (q @ k.transpose(-1, -2) * (DIM // HEADS) ** -0.5).softmax(-1)
        return self.proj(merge_heads(weights @ v))


def _mixers() -> tuple[nn.Module, nn.Module]:
    from vitarium.backbones.vim import VimMixer

    torch.manual_seed(0)
    return VimMixer(DIM).eval(), _MatrixAttention().eval()


def _time_growth() -> list[tuple[float, float]]:
    """Return the time at 4,096 tokens over the time at 1,024, of the scan and of attention, one value per round."""
    from vitarium.efficiency.timing import paired

    def call(mixer: nn.Module, tokens: int) -> Callable[[], None]:
        x = torch.randn(1, tokens, DIM)

        def run() -> None:
            with torch.inference_mode():
                mixer(x)

        return run

    scan, attention = _mixers()
    arms = {f"{name}{n}": call(mixer, n) for name, mixer in (("scan", scan), ("attention", attention)) for n in TOKENS}
    times = paired(arms, rounds=ROUNDS)
    growth = {name: [b / a for a, b in zip(*(times[f"{name}{n}"] for n in TOKENS), strict=True)] for name in ("scan", "attention")}
    return list(zip(growth["scan"], growth["attention"], strict=True))


def _memory_growth() -> tuple[float, float]:
    """Return the same ratios of peak activation bytes."""
    from vitarium.efficiency.profiler import peak_memory, weight_bytes

    scan, attention = ([peak_memory(mixer, torch.randn(1, n, DIM)) - weight_bytes(mixer) for n in TOKENS] for mixer in _mixers())
    return scan[1] / scan[0], attention[1] / attention[0]
