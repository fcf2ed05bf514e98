"""Token reductions: seconds saved against multiply-accumulates saved, and against the best known public code where it is installed.

    python benchmarks/tokens.py                                    # DeiT-S, 224 pixels, batch 4
    python benchmarks/tokens.py --model timm/deit_tiny_patch16_224 --batch 8 --methods evit:keep=0.5 tome:r=8

Every round runs all arms one after the other; the ratio of a round is the whole model's processor time over the reduced one's, and what is
printed is the median of the rounds with the least and the most. One thread: with more, other work on the machine decides.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time

import torch

import vitarium

METHODS = ["evit:keep=1", "evit:keep=0.7", "evit:keep=0.5", "tome:r=8", "tome:r=13", "tome:r=16", "pitome:keep=0.925"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="timm/deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole = vitarium.create_model(options.model).eval().to(options.device)
    arms = {text: vitarium.apply(copy.deepcopy(whole), text, quiet=True) for text in options.methods}
    size = whole.preprocessing.image_size
    image = torch.randn(options.batch, 3, size, size, device=options.device)
    times: dict[str, list[float]] = {text: [] for text in ["whole", *arms]}
    with torch.inference_mode():
        for i in range(options.rounds + 1):
            for text, model in {"whole": whole, **arms}.items():
                start = _now(options.device)
                model(image)
                if i:  # the first round warms up
                    times[text].append(_now(options.device) - start)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{options.model}, {size} pixels, batch {options.batch}, {options.device}; {options.rounds} rounds, load {load:.1f}")
    print(f"whole model: {1e3 * statistics.median(times['whole']):.1f} ms")
    for text, model in arms.items():
        ratios = [a / b for a, b in zip(times["whole"], times[text], strict=True)]
        promised = model.methods[0].macs_before / model.methods[0].macs_after
        middle = statistics.median(ratios)
        print(
            f"{text:20} {1e3 * statistics.median(times[text]):8.1f} ms  {middle:.2f}x [{min(ratios):.2f}-{max(ratios):.2f}]  "
            f"MACs {promised:.2f}x  {100 * middle / promised:.0f} % of them"
        )


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
