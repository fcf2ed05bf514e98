"""Claim: both frequencies together are as good as either alone, and folding into one convolution makes inference faster."""

import copy
import statistics
import time
from dataclasses import replace
from typing import Any

from vitarium.claims import Arm, Comparison, Measured, claim


@claim("fmvit", says="mixing frequencies is as good as the better one alone, and the folded model is faster", minutes=3)
def compare() -> list[Comparison]:
    """Digits at 16x16, two stages with an FMB in the second: the full block, attention in all channels, and convolutions in all channels
    (238, 235 and 258 thousand parameters); the same steps, recipe and seeds. Refuted where the full block is worse than either by more
    than half a point. Then processor time of fmvit_t at 224 pixels, batch 1, before and
    after `fuse()`, 20 pairs in turn: refuted below 1.15."""
    common: dict[str, Any] = dict(image_size=16, steps=400, seeds=3, overrides={"mixing.mixup": 0})
    full = Arm("both", "fmvit_pico", **common)
    low, high = (replace(full, label=label, options=dict(low_share=share)) for label, share in (("low", 1.0), ("high", 0.0)))
    return [
        Comparison("both over low alone", full, low, at_least=-0.5),
        Comparison("both over high alone", full, high, at_least=-0.5),
        Comparison("folded over unfolded at batch 1", Measured("speed", _speed(20), "x faster"), at_least=1.15),
    ]


def _speed(rounds: int) -> list[float]:
    """Return the time before over the time after folding, as medians of five rounds each, which ignore single interruptions."""
    import torch

    from vitarium.catalog import create_model

    plain: Any = create_model("fmvit_t").eval()
    models = plain, copy.deepcopy(plain).fuse()
    image = torch.randn(1, 3, 224, 224)
    ratios = []
    with torch.inference_mode():
        for model in models:
            model(image)
        for _ in range(rounds):
            times = []
            for model in models:
                start = time.process_time()
                model(image)
                times.append(time.process_time() - start)
            ratios.append(times[0] / times[1])
    return [statistics.median(ratios[i : i + 5]) for i in range(0, rounds, 5)]
