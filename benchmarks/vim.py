"""Vim against DeiT-Ti (timm) as the image grows, and the scan against an eager loop: time in interleaved pairs, and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/vim.py [--device cuda] [--sizes 224 512 1024] [--rounds 5]

The paper: at 1248x1248 Vim-Ti is 2.8x faster than DeiT-Ti and takes 86.8 % less memory. DeiT is timed twice: with attention that holds its
matrix, as in the paper, and with PyTorch's fused attention, whose memory is linear too.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import vitarium
from vitarium.efficiency.profiler import peak_memory, weight_bytes
from vitarium.efficiency.timing import paired
from vitarium.ops.scan import choose, selective_scan


def eager_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, bias: Tensor) -> Tensor:
    """The honest rival on a CPU: time-major, all states in one buffer, read out by one product at the end."""
    delta = F.softplus(delta + bias)
    x_t, delta, b, c = (v.transpose(0, 1) for v in (x, delta, b, c))
    decay, states = torch.exp(delta[..., None] * a), (delta * x_t)[..., None] * b[:, :, None]
    state = torch.zeros_like(states[0])
    if torch.is_grad_enabled():
        steps = []
        for decay_t, drive_t in zip(decay.unbind(), states.unbind(), strict=True):
            state = torch.addcmul(drive_t, decay_t, state)
            steps.append(state)
        states = torch.stack(steps)
    else:
        for decay_t, state_t in zip(decay, states, strict=True):
            state = torch.addcmul(state_t, decay_t, state, out=state_t)
    return torch.matmul(states, c[..., None])[..., 0].transpose(0, 1) + skip * x


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> str:
    """Median, least and most of the rounds' ratios."""
    found = sorted(s / f for s, f in zip(times[slow], times[fast], strict=True))
    return f"{statistics.median(found):.2f}x [{found[0]:.2f}-{found[-1]:.2f}]"


def bench_scan(device: str, rounds: int, tokens: int = 1024, channels: int = 384, states: int = 16) -> None:
    """One image, forward and forward + backward."""
    shapes = [(1, tokens, channels)] * 2 + [(channels, states)] + [(1, tokens, states)] * 2 + [(channels,)] * 2
    values = [torch.randn(s, device=device) for s in shapes]
    values[1] -= 3
    values[2] = -values[2].exp()
    ours: Callable[..., Tensor] = lambda *v: selective_scan(*v[:6], bias=v[6], softplus=True)[0]

    def forward(scan: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                scan(*values)

        return run

    def train(scan: Callable[..., Tensor]) -> Callable[[], None]:
        return lambda: scan(*(v.detach().requires_grad_() for v in values)).sum().backward()

    for name, kind in (("forward", forward), ("forward + backward", train)):
        times = paired({"ours": kind(ours), "loop": kind(eager_scan)}, rounds=rounds, device=device)
        milliseconds = {arm: 1e3 * statistics.median(t) for arm, t in times.items()}
        print(
            f"scan, {tokens} tokens, {channels} channels, {states} states, {choose(torch.device(device).type)}, {name}: "
            f"{milliseconds['ours']:.2f} ms, eager loop {milliseconds['loop']:.1f} ms, {ratio(times, 'loop', 'ours')} faster"
        )


def bench_models(device: str, sizes: list[int], rounds: int) -> None:
    """Inference of one image, by its side."""
    import timm

    slopes: dict[str, list[tuple[float, float]]] = {}
    for side in sizes:
        models = {
            "vim_tiny": vitarium.create_model("vim_tiny", image_size=side),
            "deit fused": timm.create_model("deit_tiny_patch16_224", img_size=side),
            "deit matrix": timm.create_model("deit_tiny_patch16_224", img_size=side),
        }
        for block in models["deit matrix"].blocks:
            block.attn.fused_attn = False
        image = torch.randn(1, 3, side, side, device=device)
        calls: dict[str, Callable[[], None]] = {}
        memory = {}
        for name, model in models.items():
            model.to(device).eval()
            memory[name] = (peak_memory(model, image) - weight_bytes(model)) / 1e6

            def run(model: torch.nn.Module = model, image: Tensor = image) -> None:
                with torch.inference_mode():
                    model(image)

            calls[name] = run
        times = paired(calls, rounds=rounds, device=device)
        for name in models:
            seconds = statistics.median(times[name])
            slopes.setdefault(name, []).append((seconds, memory[name]))
            faster = "" if name == "vim_tiny" else f", Vim is {ratio(times, name, 'vim_tiny')} faster"
            print(f"{side:5d} px {(side // 16) ** 2 + 1:6d} tokens {name:12s} {1e3 * seconds:9.1f} ms {memory[name]:9.1f} MB{faster}")
    for name, found in slopes.items():
        if len(sizes) > 1:
            growth = 2 * math.log(sizes[-1] / sizes[-2])
            time, memory_ = (math.log(found[-1][k] / found[-2][k]) / growth for k in (0, 1))
            print(f"{name}: from {sizes[-2]} to {sizes[-1]} px time grows as tokens^{time:.2f}, memory as tokens^{memory_:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    bench_scan(options.device, options.rounds)
    bench_models(options.device, options.sizes, options.rounds)


if __name__ == "__main__":
    main()
