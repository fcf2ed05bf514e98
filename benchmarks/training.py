"""The training loop beside a plain PyTorch loop that does the same work, by processor time.

    OMP_NUM_THREADS=1 python benchmarks/training.py
    OMP_NUM_THREADS=1 python benchmarks/training.py --workers 2 --rounds 7
    OMP_NUM_THREADS=1 python benchmarks/training.py --profile          # where the time of a step goes

Both train the same model on the same files: a random crop and flip, Mixup or CutMix, cross entropy on soft targets, AdamW, gradient
clipping, and a moving average of the weights. The plain loop is what a user of torchvision, timm and PyTorch writes; it neither saves,
logs, resumes, nor checks for losses that are not finite. The arms run in turns, each in a copy of one process in which everything is
imported; its processor time includes that of its workers. The ratio is plain over ours (above 1: ours is faster), and plain over plain
beside it is the noise.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import multiprocessing
import os
import pstats
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

import vitarium
from vitarium.training import ClassificationLearner, Recipe, fit

CLASSES, SIZE, BATCH, DECAY, CLIP, LR, WEIGHT_DECAY = 10, 32, 64, 0.999, 1.0, 1e-3, 0.05


def write_images(folder: Path, count: int) -> None:
    """Write crops of scikit-learn's photographs as PNG files: `count` for training, and one of each class held out."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    for number in range(count + CLASSES):
        photo = photos[number % len(photos)]
        left, top = (int(torch.randint(side - SIZE, (), generator=generator)) for side in photo.size)
        place = folder / ("train" if number < count else "val") / f"class{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        photo.crop((left, top, left + SIZE, top + SIZE)).save(place / f"{number:05d}.png")


def ours(folder: Path, model_name: str, steps: int, workers: int) -> None:
    """Train by `vitarium.training.fit`."""
    data = vitarium.open_data(str(folder))
    recipe = Recipe.model_validate(
        dict(
            budget={"steps": steps},
            batch_size=BATCH,
            image_size=SIZE,
            num_workers=workers,
            objective={"name": "classification", "mixing": {"mixup": 0.8, "cutmix": 1.0}, "loss": {"label_smoothing": 0.1}},
            augment={"scale": (0.35, 1.0), "flip": 0.5},
            optimizer={"lr": LR, "weight_decay": WEIGHT_DECAY},
            schedule={"warmup": 0.1},
            clip={"norm": CLIP},
            ema={"decay": DECAY},
            eval_every="1000000 steps",
        )
    )
    learner = ClassificationLearner.create(model_name, data, recipe)
    with tempfile.TemporaryDirectory() as out:
        fit(learner, data, recipe, out)


def plain(folder: Path, model_name: str, steps: int, workers: int) -> None:
    """Train by a loop of PyTorch, torchvision and timm."""
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.utils import ModelEmaV3
    from torchvision import datasets, transforms

    model = vitarium.create_model(model_name, num_classes=CLASSES, image_size=SIZE)
    how = model.preprocessing
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, (0.35, 1.0), interpolation=transforms.InterpolationMode(how.interpolation)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(how.mean, how.std),
        ]
    )
    images = datasets.ImageFolder(str(folder / "train"), transform)
    loader = torch.utils.data.DataLoader(images, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    mixup, criterion, average = (
        Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES),
        SoftTargetCrossEntropy(),
        ModelEmaV3(model, DECAY),
    )
    model.train()
    step = 0
    while step < steps:
        for image, target in loader:
            image, shares = mixup(image, target)
            optimizer.zero_grad()
            loss = criterion(model(image), shares)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            average.update(model)
            step += 1
            if step == steps:
                break


ARMS: dict[str, Callable[[Path, str, int, int], None]] = {"plain": plain, "ours": ours, "plain again": plain}


def measure(folder: Path, model: str, steps: int, workers: int, rounds: int) -> dict[str, list[float]]:
    """Return the processor seconds of each arm in each round; the arms run in turns, after a short run of each."""
    found: dict[str, list[float]] = {name: [] for name in ARMS}
    for arm in (plain, ours):
        arm(folder, model, 5, 0)
    for number in range(rounds):
        order = list(ARMS) if number % 2 == 0 else list(reversed(ARMS))
        for name in order:
            found[name].append(in_a_process(ARMS[name], folder, model, steps, workers))
    return found


def in_a_process(arm: Callable[[Path, str, int, int], None], *arguments: Any) -> float:
    """Run an arm in a copy of this process, and return the processor time that it and its workers took."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def run() -> None:
        arm(*arguments)
        gc.collect()  # ends the workers
        send.send(sum(os.times()[:4]))

    process = context.Process(target=run)
    process.start()
    seconds: float = receive.recv()
    process.join()
    return seconds


def show(found: dict[str, list[float]], steps: int, workers: int) -> None:
    """Print images per processor second, and the ratios of the rounds."""
    for name, seconds in found.items():
        print(f"workers {workers}  {name:12} {steps * BATCH / statistics.median(seconds):7.0f} images per processor second")
    for name in ("ours", "plain again"):
        ratios = [a / b for a, b in zip(found["plain"], found[name], strict=True)]
        of_medians = statistics.median(found["plain"]) / statistics.median(found[name])
        print(f"workers {workers}  plain / {name:12} {of_medians:.3f}  ({min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)} rounds)")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="swin_pico")
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument(
        "--steps", type=int, default=100, help="of a run; in shorter ones what ours does once (checks, checkpoint, evaluation) counts"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--profile", action="store_true", help="profile one run of ours and one of the plain loop, without timing them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(KeyboardInterrupt):
        folder = Path(name)
        write_images(folder, options.images)
        if options.profile:
            for arm in (plain, ours):
                arm(folder, options.model, 5, 0)
                profile = cProfile.Profile()
                profile.runcall(arm, folder, options.model, options.steps, 0)
                pstats.Stats(profile).sort_stats("tottime").print_stats(45)
            return
        for workers in options.workers:
            show(measure(folder, options.model, options.steps, workers, options.rounds), options.steps, workers)


if __name__ == "__main__":
    main()
