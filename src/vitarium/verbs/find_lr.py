"""Find a learning rate for a model, a recipe and data."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.pages.tables import TableData
from vitarium.verbs.opening import Notify, quiet
from vitarium.verbs.result import Result
from vitarium.verbs.train import open_job

if TYPE_CHECKING:
    from torch import nn

    from vitarium.training import Recipe

VAL_FRACTION = 0.2
"""Share that is held out by default."""
SHOWN = 12
"""Number of rates in the table."""


@dataclass(repr=False)
class FoundRate(Result):
    """A learning rate.

    Attributes:
        lr: the suggestion, a value of the recipe's `optimizer.lr`.
        clear: whether the loss fell clearly; else the suggestion may be chance.
        rates, losses, means: of the sweep's steps: rate, loss, and exponential mean of the losses.
        page: the curve, a self-contained HTML page.
        use: the command that trains with this rate what the search trained.
        recipe_lr: the rate of the recipe.
    """

    lr: float
    clear: bool
    rates: list[float] = field(repr=False)
    losses: list[float] = field(repr=False)
    means: list[float] = field(repr=False)
    page: Path
    use: str = ""
    recipe_lr: float | None = None

    def facts(self) -> dict[str, Any]:
        note = {} if self.clear else {"note": "the loss did not fall clearly during the sweep, so that this rate may be chance"}
        own = {} if self.recipe_lr is None else {"the recipe's lr": f"{self.recipe_lr:g}"}
        return {"lr": f"{self.lr:.2g}", **own, **note, "curve": self.page}

    def tables(self) -> list[TableData]:
        places = range(0, len(self.rates), max(1, len(self.rates) // SHOWN))
        rows = [[f"{self.rates[i]:.2g}", f"{self.losses[i]:.3f}", f"{self.means[i]:.3f}"] for i in places]
        return [TableData("Sweep", [">lr", ">loss", ">mean"], rows)]

    def to_dict(self) -> dict[str, Any]:
        found = {"lr": self.lr, "recipe_lr": self.recipe_lr, "clear": self.clear, "page": str(self.page)}
        return {**found, "rates": self.rates, "losses": self.losses, "means": self.means}


def find_lr(
    recipe: str | os.PathLike[str] | Recipe,
    data: str | os.PathLike[str] | None = None,
    *,
    model: str | os.PathLike[str] | nn.Module | None = None,
    pretrained: bool = False,
    checkpoint: str | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    changes: Sequence[str] | None = None,
    apply: Sequence[Any] | None = None,
    val_fraction: float = VAL_FRACTION,
    out: str | os.PathLike[str] | None = None,
    steps: int = 100,
    accelerator: str = "auto",
    notify: Notify = quiet,
) -> FoundRate:
    """Find a learning rate: train a copy of the model while the rate rises exponentially, and suggest the one of the steepest fall.

    The run's folder receives find_lr.html with the curve; a training that was begun there is not touched.

    Args:
        recipe, data, model, pretrained, checkpoint, batch_size, image_size, changes, apply, val_fraction, out: as for `vitarium.train`.
        steps: of the sweep, from a rate of 1e-5 to 1; it ends early where the loss diverges.
        accelerator: "auto", "cpu", "cuda" or "mps".
        notify: called with the reports of methods.

    Raises:
        UsageError, DataError, CheckpointError: as for `vitarium.train`; several players; or a loss that is never finite.
    """
    from vitarium.files import check_writable
    from vitarium.training.rate_finder import sweep_rates
    from vitarium.training.report import write_rate_page
    from vitarium.training.shorthands import with_shorthands

    given = with_shorthands(list(changes or []), dict(batch_size=batch_size, image_size=image_size))
    job = open_job(recipe, data, model, pretrained, checkpoint, given, apply, val_fraction, out, notify)
    check_writable(job.folder)
    sweep = sweep_rates(job.learner, job.images, job.recipe, steps=steps, accelerator=accelerator)
    weights = dict(model=model, pretrained=pretrained, checkpoint=checkpoint)
    options: dict[str, Any] = dict(
        batch_size=batch_size, image_size=image_size, changes=changes, apply=apply, out=out, accelerator=accelerator
    )
    options["val_fraction"] = val_fraction if val_fraction != VAL_FRACTION else None
    use = command_with(sweep.suggestion, recipe, data, weights, options)
    page = write_rate_page(job.folder, job.name, job.images.name, sweep, job.recipe, use)
    return FoundRate(sweep.suggestion, sweep.clear, sweep.rates, sweep.losses, sweep.means, page, use, job.recipe.optimizer.lr)


def command_with(lr: float, recipe: Any, data: Any, weights: dict[str, Any], options: dict[str, Any]) -> str:
    """Return the command, quoted for a shell, that trains what the search trained, with a learning rate.

    Args:
        lr: the rate.
        recipe, data: as for `find_lr`; a recipe or a model that is an object is written RECIPE or MODEL.
        weights: model, pretrained and checkpoint.
        options: further arguments of `find_lr`; those that are missing or None are left out.
    """
    text = lambda value, other: os.fspath(value) if isinstance(value, str | os.PathLike) else other
    model = None if weights["model"] is None else text(weights["model"], "MODEL")
    values = {"--data": data, "--model": model, "--checkpoint": weights["checkpoint"]}
    values |= {f"--{name.replace('_', '-')}": options.get(name) for name in ("batch_size", "image_size", "val_fraction")}
    words = ["vitarium", "train", text(recipe, "RECIPE")]
    words += [word for name, value in values.items() if value is not None for word in (name, str(value))]
    words += ["--pretrained"] if weights["pretrained"] else []
    words += [word for change in options.get("changes") or () for word in ("--set", change)]
    words += [word for method in options.get("apply") or () for word in ("--apply", str(method))]
    words += ["--lr", f"{lr:.2g}"]
    words += ["--out", os.fspath(options["out"])] if options.get("out") is not None else []
    words += ["--accelerator", options["accelerator"]] if options.get("accelerator", "auto") != "auto" else []
    return shlex.join(words)
