"""Calibration of the scene tasks that need a mechanism: one network with it and without it, under one budget.

    OMP_NUM_THREADS=1 python benchmarks/scenes.py                          # every task, one seed
    OMP_NUM_THREADS=1 python benchmarks/scenes.py far_sum --seeds 3

The network is a small ResNet (timm/resnet_pico, 0.3 M parameters). What it lacks is taken from its view of the image, so that architecture,
parameters and steps are the same: it sees the image in windows and averages their logits (no relation of far places), or an image without
its fine details (averaged over squares and enlarged again). A task is calibrated if the network with the mechanism passes 85 % and each one
without stays ten points below.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from vitarium.data import open_data
from vitarium.training import ClassificationLearner, evaluate, fit, load_recipe

PASSES, MARGIN = 85.0, 10.0


@dataclass(frozen=True)
class Control:
    """A network of a calibration.

    Args:
        label: name in the table.
        view: what it sees: "" the image, "windows 16" windows of 16 pixels one by one, "blurred 4" means of squares of 4 pixels.
        options: of `open_data` for the test, such as "image_size=64"; "" tests on the held-out part.
        reduced: whether the images of the test are resized to those of the training.
    """

    label: str
    view: str = ""
    options: str = ""
    reduced: bool = False


@dataclass(frozen=True)
class Calibration:
    """Controls of a task and their budget; the first has the mechanism."""

    steps: int
    controls: Sequence[Control]


WHOLE = Control("whole image")
FLAT = Control("squares of 4 pixels averaged", "blurred 4")
CALIBRATIONS = {
    "far_sum": Calibration(700, (WHOLE, Control("quadrants, one by one", "windows 16"))),
    "textures": Calibration(300, (WHOLE, FLAT)),
    "two_scales": Calibration(300, (WHOLE, Control("cells, one by one", "windows 8"), Control("means of cells", "blurred 8"))),
    "size_transfer": Calibration(
        500,
        (
            Control("tested at 64", options="image_size=64"),
            Control("64 reduced to 32", options="image_size=64", reduced=True),
        ),
    ),
    "fine_parts": Calibration(500, (WHOLE, FLAT)),
    "tissue": Calibration(300, (WHOLE, FLAT)),
}


def blurred(side: int, images: Tensor) -> Tensor:
    """Replace each square of `side` pixels by its mean, and resize smoothly to the same shape, (B, C, H, W)."""
    return F.interpolate(F.avg_pool2d(images, side), images.shape[-2:], mode="bilinear")


def in_windows(side: int, images: Tensor) -> Tensor:
    """Cut images into windows, (B, C, H, W) -> (B * windows, C, side, side)."""
    windows = images.unfold(2, side, side).unfold(3, side, side)  # B, C, rows, columns, side, side
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1], side, side)


def restrict(model: nn.Module, view: str, image_size: int) -> None:
    """Restrict what a model sees, in place (see `Control.view`)."""
    if not view:
        return
    kind, side = view.split()[0], int(view.split()[1])
    change = functools.partial({"windows": in_windows, "blurred": blurred}[kind], side)
    model.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]),))
    if kind == "windows":
        count = (image_size // side) ** 2
        model.register_forward_hook(lambda _, inputs, logits: logits.unflatten(0, (-1, count)).mean(1))


@functools.cache
def trained(task: str, steps: int, view: str, seed: int) -> Any:
    """Return a network trained on a task."""
    recipe = load_recipe("pico", [f"budget.steps={steps}", "batch_size=64", "mixing.mixup=0", f"seed={seed}", "eval_every=1.0"])
    data = open_data(f"scenes:task={task}")
    torch.manual_seed(seed)
    model = vitarium.create_model("timm/resnet_pico", num_classes=len(data.classes), image_size=data.image_size)
    restrict(model, view, data.image_size)
    with tempfile.TemporaryDirectory() as folder:
        learner = ClassificationLearner.create(model, data, recipe)
        fit(learner, data, recipe, folder)
    return learner.eval_model()


def accuracy(task: str, steps: int, control: Control, seed: int) -> float:
    """Return the accuracy of a control on the held-out part, in percent."""
    model = trained(task, steps, control.view, seed)
    data = open_data(f"scenes:task={task}{control.options and ','}{control.options}")
    side = model.preprocessing.image_size if control.reduced else data.image_size
    before, model.preprocessing = model.preprocessing, replace(model.preprocessing, image_size=side)
    found = evaluate(model, data.val)["accuracy"]
    model.preprocessing = before
    return 100 * found


def calibrate(task: str, seeds: int) -> bool:
    """Print the accuracies of a task's controls, and return whether it is calibrated."""
    means = []
    for control in CALIBRATIONS[task].controls:
        start = time.process_time()
        values = [accuracy(task, CALIBRATIONS[task].steps, control, seed) for seed in range(seeds)]
        seconds = (time.process_time() - start) / seeds
        means.append(statistics.fmean(values))
        print(f"{task:14} {control.label:32} {' '.join(f'{v:5.1f}' for v in values)}  {seconds:4.0f} s", flush=True)
    return means[0] >= PASSES and all(mean <= means[0] - MARGIN for mean in means[1:])


def main() -> None:
    """Calibrate the tasks named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(CALIBRATIONS), help=f"of {', '.join(CALIBRATIONS)}")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    verdicts = {task: calibrate(task, options.seeds) for task in options.tasks}
    print("\n".join(f"{task}: {'calibrated' if good else 'NOT calibrated'}" for task, good in verdicts.items()))


if __name__ == "__main__":
    main()
