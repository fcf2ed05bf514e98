"""A recipe: all settings of a training run, checked before it starts. `load_recipe` reads one from a YAML file."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vitarium.data.transforms import Augment
from vitarium.errors import nearest
from vitarium.training.lengths import Budget as Budget
from vitarium.training.lengths import Span as Span
from vitarium.training.lengths import Stopping as Stopping
from vitarium.training.lengths import Stretch as Stretch
from vitarium.training.settings import Count, Positive, Section, check, merged

MOST_ENTRIES = 1000
"""Largest number of milestones, of patterns of a phase, and of items in a model's argument."""
MOST_BLOCKS, MOST_SIZE = 1000, 10**6
"""Largest number of blocks, and largest other number, in a model's arguments: a larger model takes hours to build."""


KNOWN_OPTIMIZERS = ("adamw", "sgd", "lamb", "lars", "lars_mae", "lion", "muon", "adan")


class Sam(Section):
    """Sharpness-aware minimisation: each step takes the gradient at weights perturbed uphill, which favours flat minima.

    Each step has two passes over the same batches with the same random numbers. The base optimizer, weight decay and clipping use only the
    second gradient; batch norms update their statistics only in the first pass. With several processes the perturbation is that of the
    whole batch, so that the result does not depend on their number (in the authors' code each device perturbs by its own share of the
    batch).

    Args:
        rho: length of the perturbation, over all weights together; 0: none. 0.05 to 0.2 for ViTs, up to 0.6 for MLP-Mixers.
        adaptive: measure it relative to each weight's magnitude (ASAM); rho is then about ten times larger.
    """

    rho: Annotated[float, Field(ge=0)] = 0.05
    adaptive: bool = False


class Optimizer(Section):
    """An optimizer of timm's registry, or "lars_mae", and its hyperparameters.

    Args:
        name: "adamw", "sgd", "lamb", "lars", "lion", "muon", or any other of timm's; "lars_mae": LARS as in MoCo v3 and MAE, which scales
            by |w| / |g + decay w| (timm's "lars": by |w| / (|g| + decay |w|), and only where the decay is not 0).
        lr: peak learning rate, at a total batch of `reference_batch`.
        reference_batch: the total batch (over accumulation and processes) that `lr` and the schedule's rates are meant for: they
            are scaled linearly to the actual one. None: not scaled.
        weight_decay: of tensors with two or more axes, except those in the model's `no_weight_decay`.
        layer_decay: each layer's rate is this times the rate of the layer above it; None: one rate for all.
        betas, eps, momentum: for optimizers that have them; None: the optimizer's defaults.
        sam: settings of sharpness-aware minimisation (see `Sam`); None: off.
    """

    name: str = "adamw"
    lr: Positive
    reference_batch: Count | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    betas: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=2, max_length=3)] | None = None
    eps: Positive | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    sam: Sam | None = None

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        if name not in KNOWN_OPTIMIZERS:
            from timm.optim import list_optimizers

            names = [str(known) for known in list_optimizers()]
            if name not in names:
                raise ValueError(f"timm has no such optimizer{nearest(name, names)}")
        return name


class Schedule(Section):
    """Learning rate over the steps: linear from `warmup_lr` to the peak, at the peak for `hold`, then down to `min_lr` along its shape.

    Args:
        name: shape of the fall: half a "cosine", "linear", "polynomial", "step" (times `gamma` at each milestone), none ("constant"), or
            "one_cycle" (torch's OneCycleLR: rise and fall along half cosines; momentum is not changed).
        warmup, warmup_lr: length of the rise, and the rate that it starts from.
        min_lr: rate at the end of the fall, and least rate of "step".
        hold: length of the stay at the peak.
        cooldown: length of the last part, at `min_lr`.
        power: exponent of "polynomial".
        milestones: where "step" lowers the rate, from the beginning of the training.
        every: a regular interval at which "step" lowers it too.
        gamma: factor of "step".
        warmup_prefix: whether the fall begins after the warm-up. Else it is counted from the beginning of the training, as timm's trainer
            and DeepLab do, and the rate goes from the peak to the curve's value when the warm-up ends.
        updates: "step", or "epoch" for a rate that is constant within an epoch.
    """

    name: Literal["cosine", "constant", "linear", "polynomial", "step", "one_cycle"] = "cosine"
    warmup: Stretch = Span(amount=0.05, unit="share")
    warmup_lr: Annotated[float, Field(ge=0)] = 0.0
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    hold: Stretch = Span(amount=0, unit="share")
    cooldown: Stretch = Span(amount=0, unit="share")
    power: Positive = 1.0
    milestones: Annotated[tuple[Stretch, ...], Field(max_length=MOST_ENTRIES)] = ()
    every: Stretch | None = None
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    warmup_prefix: bool = True
    updates: Literal["step", "epoch"] = "step"

    @model_validator(mode="after")
    def _shape_has_its_settings(self) -> Schedule:
        steps = bool(self.milestones) or self.every is not None
        if steps != (self.name == "step"):
            need = "needs milestones or every" if self.name == "step" else "has no milestones and no every, which belong to name: step"
            raise ValueError(f"{self.name} {need}")
        if self.power != 1.0 and self.name != "polynomial":
            raise ValueError(f"{self.name} has no power, which belongs to name: polynomial")
        return self


LATER_KEYS = {"schedule": ("hold", "cooldown", "power", "milestones", "every", "gamma", "warmup_prefix", "updates")}
"""Section -> keys that recipes of earlier versions do not have. At their defaults they are no part of a recipe's identity."""


class Ema(Section):
    """An exponential moving average of the weights, which is evaluated and saved in their place.

    Args:
        decay: share of the old average that a step keeps.
        warmup: increase the decay from 0 with the steps, for short trainings.
    """

    decay: Annotated[float, Field(ge=0, lt=1)]
    warmup: bool = False


class Clip(Section):
    """Limits on the gradient: on its norm over all tensors, on each tensor's norm, or on each value. At most one."""

    norm: Positive | None = None
    tensor_norm: Positive | None = None
    value: Positive | None = None

    @model_validator(mode="after")
    def _at_most_one(self) -> Clip:
        if sum(limit is not None for limit in (self.norm, self.tensor_norm, self.value)) > 1:
            raise ValueError("give at most one of norm, tensor_norm, value")
        return self


class BatchNorm(Section):
    """Settings of the model's batch norms, for trainings of another length than the authors'.

    Args:
        momentum: share of the running statistics that an update replaces; None: the model's own.
        estimate: replace the running statistics, before an evaluation and in the final model, by those of training images. "auto": where
            the momentum is below 0.1 and 1/momentum over a twentieth of the training's updates, as MaxViT's 0.01 in fewer than 2,000 steps.
        frozen: keep the running statistics, and normalise by them in training too (fine-tuning of TinyViT); weights and biases are trained.
    """

    momentum: Annotated[float, Field(gt=0, le=1)] | None = None
    estimate: Literal["auto"] | bool = "auto"
    frozen: bool = False

    @model_validator(mode="after")
    def _frozen_statistics_do_not_change(self) -> BatchNorm:
        if self.frozen and (self.momentum is not None or self.estimate is True):
            raise ValueError("frozen statistics have no momentum and are not estimated; set frozen=false")
        return self


class PlayerRecipe(Section):
    """Settings of one player, under `players.NAME` of a recipe; keys that are not set default to the recipe's root."""

    optimizer: Optimizer
    schedule: Schedule = Schedule()
    clip: Clip = Clip()
    ema: Ema | None = None


class Phase(Section):
    """A phase of a training with its own settings.

    Args:
        until: where it ends, counted from the beginning of the training; None (in the last phase only): at the end.
        freeze: patterns of parameters that are frozen, such as "model.stages.0" or "model.*.bias". A pattern stands for the parameters
            whose names it matches, and for all parameters of modules whose names it matches.
        train: patterns of parameters that are trained, even if `freeze` matches them or the learner froze them.
        image_size: side of the square input, pixels; None: the recipe's.
        values: numbers by path, such as "objective.coefficient": 0.1; see `Course`.
    """

    until: Stretch | None = None
    freeze: Annotated[tuple[str, ...], Field(max_length=MOST_ENTRIES)] = ()
    train: Annotated[tuple[str, ...], Field(max_length=MOST_ENTRIES)] = ()
    image_size: Annotated[int, Field(ge=1, le=8192)] | None = None
    values: dict[str, float] = Field(default_factory=dict)


class Course(Section):
    """A number as a function of the step: `from` up to `start`, then along the shape to `to`, which is reached at `until`.

    Its path is "objective.KEY", a number of the learner's settings; "method.SLUG.OPTION", a live option of a method on the model;
    "optimizer.weight_decay" or "optimizer.momentum"; or "model.drop_path_rate" (see `vitarium.training.values`).

    Args:
        from_: the first value; written `from` in a recipe.
        to: the last value.
        start, until: where the change begins and ends, counted from the beginning of the training.
        shape: "linear" or half a "cosine".
    """

    from_: float = Field(alias="from")
    to: float
    start: Stretch = Span(amount=0, unit="share")
    until: Stretch = Span(amount=1, unit="share")
    shape: Literal["linear", "cosine"] = "cosine"


EARLIER_KEYS = ("loss", "mixing")
"""Keys at the root of recipes of version 0.1.0 that are now settings of the objective."""


def earlier_keys_moved(values: Any) -> Any:
    """Return nested settings with the keys of earlier recipes moved to their present place."""
    moved = [key for key in EARLIER_KEYS if isinstance(values, dict) and key in values]
    objective = values.get("objective", {}) if moved else None
    if not isinstance(objective, dict):
        return values  # nothing to move, or an invalid objective, which its own check reports
    kept = {key: value for key, value in values.items() if key not in moved}
    return {**kept, "objective": {**objective, **{key: values[key] for key in moved}}}


class Recipe(Section):
    """All settings of a training run.

    Args:
        objective: name of a learner, and its settings ({name: repa, coefficient: 0.5}).
        model: model that `vitarium train` builds by default.
        data: data that `vitarium train` opens by default.
        model_arguments: arguments of `create_model` that belong to the recipe, such as drop_path_rate.
        apply: methods that `vitarium train` applies to the model before training, as "evit:keep=0.7".
        image_size: side of the square input, pixels; None: the model's own.
        batch_size: images that one process holds in memory per batch.
        accumulate: number of batches per optimizer step; the total batch is batch_size x accumulate x processes.
        repeats: augmented copies of an image in an epoch (repeated augmentation).
        sampling: "shuffled", every training image once an epoch; or "balanced", every class equally often in an epoch of the same length.
        batch_norm: momentum and statistics of batch norms (see `BatchNorm`).
        players: for a learner with several players: name -> settings that differ from the root's (see `PlayerRecipe`).
        phases: consecutive parts of the training with their own settings; after the last one the root's settings apply.
        values: numbers that change with the step, by path (see `Course`).
        precision: "32-true", "bf16-mixed" or "64-true".
        eval_every: interval between evaluations; the final model is always evaluated.
        stopping: early stopping (see `Stopping`); None: the whole budget is used.
        log_every: optimizer steps between lines of log.csv.
        log: where numbers are logged beside log.csv, see `vitarium.training.boards`; TensorBoard only if it is installed.
        checkpoint_minutes: minutes between checkpoints of the run.
        num_workers: number of processes that read images; None: 0 for small images in memory, else by the number of cores.
            At most 4 per core (or 16) are started.
        seed: random seed of the sample order, the augmentation and everything else.
    """

    version: Literal[1] = 1
    objective: dict[str, Any] = Field(default_factory=lambda: {"name": "classification"})
    model: str | None = None
    data: str = "digits"
    model_arguments: dict[str, str | bool | int | float | list[int] | None] = Field(default_factory=dict)
    apply: tuple[str, ...] = ()
    image_size: Annotated[int, Field(ge=1, le=8192)] | None = None
    budget: Budget
    batch_size: Count = 64
    accumulate: Count = 1
    repeats: Count = 1
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    augment: Augment = Augment()
    ema: Ema | None = None
    clip: Clip = Clip()
    batch_norm: BatchNorm = BatchNorm()
    players: dict[str, dict[str, Any]] = Field(default_factory=dict)
    phases: tuple[Phase, ...] = ()
    values: dict[str, Course] = Field(default_factory=dict)
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "32-true"
    eval_every: Stretch = Span(amount=1, unit="epochs")
    stopping: Stopping | None = None
    log_every: Count = 50
    log: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    checkpoint_minutes: Positive = 10.0
    num_workers: Annotated[int, Field(ge=0, le=256)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="before")
    @classmethod
    def _earlier(cls, values: Any) -> Any:
        return earlier_keys_moved(values)

    @field_validator("objective")
    @classmethod
    def _named(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            given = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError("must hold plain finite values") from error
        return {"name": str(given.pop("name", "classification")), **given}

    @field_validator("model_arguments")
    @classmethod
    def _model_can_be_built(cls, given: dict[str, Any]) -> dict[str, Any]:
        for key, value in given.items():
            most = MOST_BLOCKS if "depth" in key or "layers" in key else MOST_SIZE
            numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int | float)]
            if any(abs(number) > most for number in numbers) or len(numbers) > MOST_ENTRIES:
                raise ValueError(
                    f"{key} must be at most {most:,} (and a list have at most {MOST_ENTRIES} items), else no model can be built"
                )
        return given

    @model_validator(mode="after")
    def _parts_are_whole(self) -> Recipe:
        for name in self.players:
            self.player(name)
        for number, phase in enumerate(self.phases[:-1]):
            if phase.until is None:
                raise ValueError(f"phases.{number}.until is missing: only the last phase may go on to the end")
        return self

    def player(self, name: str) -> PlayerRecipe:
        """Return the settings of one player; those of the recipe's root for a player without an entry."""
        root = {key: getattr(self, key).model_dump() if getattr(self, key) else None for key in PlayerRecipe.model_fields}
        given = self.players.get(name, {})
        if "clip" in given:
            root["clip"] = {}  # these keys are mutually exclusive
        return check(PlayerRecipe, merged(root, given), f"players.{name}")

    def settings_of(self, learner: Any) -> Any:
        """Return the objective's settings, checked by the learner's class."""
        given = {key: value for key, value in self.objective.items() if key != "name"}
        return check(learner.Settings, given, f"settings of {self.objective['name']}")

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the result of a run, as plain values: not logging and checkpoint intervals, nor
        num_workers."""
        excluded = {"log_every", "log", "checkpoint_minutes", "num_workers", "model", "model_arguments", "data"}
        unset = {
            "apply": (),
            "players": {},
            "phases": (),
            "values": {},
            "batch_norm": BatchNorm(),
            "stopping": None,
            "sampling": "shuffled",
        }
        excluded |= {name for name, usual in unset.items() if getattr(self, name) == usual}  # so that recipes without keep their digest
        values = self.model_dump(mode="json", by_alias=True, exclude=excluded)
        for section, keys in LATER_KEYS.items():
            usual = type(getattr(self, section))().model_dump(mode="json")
            values[section] = {k: v for k, v in values[section].items() if k not in keys or v != usual[k]}
        return values

    def digest(self) -> str:
        """Hex digest of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
