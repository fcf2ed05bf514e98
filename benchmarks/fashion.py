"""Small models on `fashion`: the sweep behind the recipe "fashion" and the default models of `vitarium compare`.

    OMP_NUM_THREADS=1 python benchmarks/fashion.py timm/resnet_pico convnext_pico --steps 900 --lr 0.003
    OMP_NUM_THREADS=1 python benchmarks/fashion.py swin_pico --option "patch_size=2" --set augment.flip=0.5 --seeds 3
    python benchmarks/fashion.py --show                                       # the table

Each row of `fashion.json` is one training: model, options, changes of the recipe, seed, accuracy on the 2,000 test images, seconds of
processor time on one core. A training that the file has is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from vitarium.assignments import parse_assignment
from vitarium.catalog import create_model
from vitarium.data import open_data
from vitarium.files import write_json
from vitarium.training import ClassificationLearner, fit, load_recipe

OUTPUT = Path(__file__).with_suffix(".json")


def train(model: str, options: dict[str, Any], recipe: str, changes: list[str], seed: int, image_size: int) -> dict[str, Any]:
    """Train a model and return accuracy, percent, and processor time, seconds."""
    settings = load_recipe(recipe, [*changes, f"seed={seed}", "eval_every=1.0"])
    data = open_data("fashion")
    torch.manual_seed(seed)
    net = create_model(model, num_classes=len(data.classes), image_size=image_size, **options)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        found = fit(ClassificationLearner.create(net, data, settings), data, settings, Path(folder))
    seconds = round(time.process_time() - start)
    metrics = {name: round(value, 4) for name, value in found.metrics.items()}
    params = sum(p.numel() for p in net.parameters())
    return {"accuracy": round(100 * metrics["accuracy"], 2), "metrics": metrics, "params": params, "seconds": seconds}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the mean accuracy and time of each setting over its seeds."""
    groups = defaultdict(list)
    for row in rows:
        options = " ".join(f"{key}={value}" for key, value in row["options"].items())
        name = " ".join(filter(None, [row["model"], options, row["recipe"], *row["changes"], f"{row['image_size']} px"]))
        groups[name].append(row)
    for name, found in sorted(groups.items(), key=lambda group: -statistics.mean(row["accuracy"] for row in group[1])):
        accuracy = [row["accuracy"] for row in found]
        spread = f" ± {statistics.stdev(accuracy):.1f}" if len(accuracy) > 1 else ""
        print(f"{statistics.mean(accuracy):5.1f}{spread:6s} {statistics.mean(row['seconds'] for row in found):4.0f} s  {name}")


def main() -> None:
    """Train what is asked and not there, and write each row at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--option", action="append", default=[], help="argument of the models, KEY=VALUE")
    parser.add_argument("--recipe", default="fashion")
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--show", action="store_true")
    asked = parser.parse_args()
    options = dict(parse_assignment(text, "--option wants KEY=VALUE") for text in asked.option)
    changes = list(asked.changes)
    changes += [f"budget.steps={asked.steps}"] if asked.steps else []
    changes += [f"optimizer.lr={asked.lr}"] if asked.lr else []
    for model in asked.models:
        for seed in range(asked.seeds):
            rows = json.loads(asked.output.read_text()) if asked.output.exists() else []
            key = dict(model=model, options=options, recipe=asked.recipe, changes=changes, image_size=asked.image_size, seed=seed)
            if any(all(row[name] == value for name, value in key.items()) for row in rows):
                continue
            row = key | train(model, options, asked.recipe, changes, seed, asked.image_size)
            print(f"{row['accuracy']:5.1f} % in {row['seconds']} s: {model} {options or ''} {' '.join(changes)} seed {seed}", flush=True)
            write_json(asked.output, [*rows, row])
    if asked.show:
        show(json.loads(asked.output.read_text()))


if __name__ == "__main__":
    main()
