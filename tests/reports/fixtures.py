"""A comparison as it might come out, without any training: for the tests of the page."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from PIL import Image

from vitarium.reports.results import Comparison, Failure, Trial

NUMBERS = {  # accuracy, latency ms, throughput, memory MB, parameters, MACs
    "swin_pico": (0.978, 1.92, 4100.0, 9.4, 116_000, 3_600_000),
    "convnext_pico": (0.986, 1.31, 5200.0, 8.1, 121_000, 4_100_000),
    "swin_mlp_pico": (0.964, 1.75, 4300.0, 8.9, 98_000, 2_900_000),
    "convnext_iso_pico": (0.972, 0.88, 9900.0, 4.2, 147_000, 2_250_000),
    "timm/vit_pico": (0.969, 0.71, 12400.0, 3.9, 84_000, 1_300_000),
    "timm/resnet_pico": (0.981, 0.62, 15100.0, 6.0, 176_000, 1_050_000),
}
CLASSES = [str(d) for d in range(10)]
HELD_OUT = 360


def make_trial(name: str, place: int = 0, classes: int = 10) -> Trial:
    """One plausible model."""
    accuracy, latency, throughput, memory, params, macs = NUMBERS[name]
    draw = random.Random(place)
    confusion = [[0] * classes for _ in range(classes)]
    mistakes = []
    for index in range(HELD_OUT):
        true = index % classes
        wrong = index < round((1 - accuracy) * HELD_OUT)
        predicted = (true + draw.choice([1, 3, 7])) % classes if wrong else true
        confusion[true][predicted] += 1
        if wrong:
            shown = {"true": true, "predicted": predicted, "confidence": draw.uniform(0.35, 0.99)}
            mistakes.append({"index": index, "image": f"digits #{index}", **shown})
    history: list[dict[str, Any]] = [
        {"step": step, "train_loss": 2.3 * math.exp(-step / 180) + 0.55 + draw.uniform(0, 0.1)} for step in range(20, 601, 20)
    ]
    history += [{"step": step, "accuracy": accuracy - 0.9 * math.exp(-step / 90)} for step in range(60, 601, 60)]
    return Trial(
        name, accuracy, {"accuracy": accuracy, "loss": 0.09}, HELD_OUT, latency, throughput, memory, params, macs,
        4 * params, 16, 600, 17.4 + place, sorted(history, key=lambda point: point["step"]), [],
        f"models/{name.replace('/', '-')}/model.safetensors",
        extras={"confusion": confusion, "mistakes": sorted(mistakes, key=lambda m: -m["confidence"])},
    )  # fmt: skip


def make_comparison(folder: Path, **changes: Any) -> Comparison:
    """Six models on the digits."""
    values: dict[str, Any] = dict(
        folder=folder,
        data="digits",
        images={"train": 1437, "val": HELD_OUT},
        classes=CLASSES,
        budget={"steps": 600},
        settings={
            "recipe": "pico", "batch_size": 64, "seed": 0, "pretrained": False, "devices": 1, "accelerator": "auto", "measuring_batch": 32
        },
        machine={
            "processor": "AMD EPYC 9B14", "cores": 2, "threads": 2, "accelerator": None, "system": "Linux-6.1-x86_64-with-glibc2.39",
            "python": "3.12.3", "torch": "2.15.0", "timm": "1.0.31", "vitarium": "0.1.0",
        },
        created="2026-11-24T21:40:00+00:00",
        trials=[make_trial(name, place) for place, name in enumerate(NUMBERS)],
        failures=[],
    )  # fmt: skip
    return Comparison(**{**values, **changes})


def make_images(comparison: Comparison, side: int = 16) -> dict[int, Image.Image | None]:
    """One for each mistake of the best."""
    mistakes = comparison.best.extras["mistakes"]
    return {m["index"]: Image.linear_gradient("L").resize((side, side)).rotate(20 * i) for i, m in enumerate(mistakes)}


def make_troubled(folder: Path) -> Comparison:
    """Failed models, broken images, and names that want to be HTML."""
    bad = [{"path": f"photos/cat/IMG_{i:04}<b>.jpg", "reason": "truncated after 2,048 bytes"} for i in range(3)]
    trials = [make_trial(name, place) for place, name in enumerate(NUMBERS)]
    trials[1] = Trial(**{**vars(trials[1]), "bad_files": bad})
    failures = [Failure("swin_tiny", "SwinTransformer takes images of at least 32x32 pixels, got 16x16")]
    classes = ["<script>alert(1)</script>", "</script>", "a & b", *CLASSES[3:]]
    return make_comparison(folder, trials=trials, failures=failures, classes=classes, data="<img src=x onerror=alert(1)>")
