"""The contract between a learner and the loop that drives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from vitarium.catalog.create import preprocessing_of
from vitarium.training.draws import Draws, positions_of
from vitarium.training.players import ONLY, Player
from vitarium.training.settings import Section
from vitarium.training.steppers import SharpnessAware, Stepper

if TYPE_CHECKING:
    from PIL import Image

    from vitarium.data import ImageData
    from vitarium.data.transforms import Augment
    from vitarium.training.recipe import Phase, PlayerRecipe, Recipe
    from vitarium.training.tasks import Task

Batch = dict[str, Any]


class Learner(nn.Module):
    """A way to teach a model: holds the model (and whatever else it needs), and turns a batch into a loss.

    The loop owns devices, precision, optimizer, rates, accumulation, clipping, moving average, evaluation, logs and checkpoints. A new
    learner is a subclass with a `loss`, registered for a task:

        @learner("brightness", task="encode")
        class Brightness(Learner):
            def loss(self, batch):
                return {"loss": (self.model(batch["image"]).mean(1) - batch["image"].mean((1, 2, 3))).square().mean()}

    What a subclass may rely on:
    - `loss` runs under the recipe's precision, data-parallel where there are several processes, and after all generators were seeded from
      (seed, step, rank): what it draws from them is the same when a run is resumed. State that must survive is in parameters and buffers.
    - `before_step(step, total)` is called ahead of each step and `after_step(step, total)` once the weights have changed: the place
      for schedules of momentum or temperature and for teachers that follow their student.
    - Every parameter with `requires_grad` is trained: the model's by layers, others (a projector, a decoder) at the full rate, or at
      another: an attribute `rates` maps a parameter's name to its share of the rate.
    - `eval_model()` is what is averaged (EMA), evaluated and saved: the model, unless a subclass says otherwise (a teacher, a generator).

    An adversarial learner trains several players, each with its optimizer: `players` names them, and `loss(batch, player)` and
    `first_pass(batch, player)` then take the player's name as a second argument (see `vitarium.training.players`).

    Args:
        model: the model that training is about.
        settings: its settings; None: their defaults. A learner must be constructible from a loaded model alone, because `vitarium
            evaluate` does that.
    """

    objective: ClassVar[str] = ""
    """Name under which `@learner` registered it."""

    task_name: ClassVar[str] = "pretrain"
    """Task of the models that it trains, as `parse_task` reads it; set by `@learner(NAME, task=...)`."""

    usage: ClassVar[str | None] = None
    """Command to show after training, with {file} for the saved model; None: the task's."""

    class Settings(Section):
        """Settings of the learner: a recipe's `objective` without its name. A key that is not here is an error."""

    def __init__(self, model: nn.Module, settings: Any = None):
        super().__init__()
        self.model = model
        self.settings = settings if settings is not None else self.Settings()
        self.draws = Draws(0, 0, ONLY)  # the loop sets those of each step

    @classmethod
    def create(
        cls, name: str | nn.Module, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None
    ) -> Learner:
        """Make the learner with its model. Commands, claims and tests all come through here.

        Args:
            name: name of the model, or a model that exists already.
            data: what it will be trained on.
            recipe: for sizes, arguments and the learner's settings.
            pretrained: start from published weights.
            checkpoint: start from these weights: file, "hf:OWNER/NAME", or address.

        Raises:
            UsageError, CheckpointError: no such model, arguments or settings that it does not take, weights that do not fit.
        """
        from vitarium.training.building import build_model

        settings = recipe.settings_of(cls)
        return cls(build_model(name, data, recipe, pretrained=pretrained, checkpoint=checkpoint), settings)

    @classmethod
    def task_for(cls, settings: Any) -> Task:
        """Return the task under these settings. A learner whose settings hold options of its task overrides this."""
        from vitarium.training.tasks.registry import parse_task

        return parse_task(cls.task_name)

    @property
    def task(self) -> Task:
        """The task of the model."""
        return self.task_for(self.settings)

    @property
    def primary_metric(self) -> tuple[str, str]:
        """Name of the metric that decides which evaluation is best, and "max" or "min"; the task's unless a subclass says otherwise."""
        primary = self.task.primary
        return primary.name, primary.best

    def players(self) -> Mapping[str, Player]:
        """Return what takes optimizer steps of its own, by name, in the order of the steps; by default the learner as one player."""
        return {ONLY: Player(self, ema=self.eval_model())}

    def phases(self) -> Sequence[Phase]:
        """Return the learner's own phases, for recipes without any: what it keeps frozen, for instance (see `vitarium.training.phases`)."""
        return ()

    def first_pass(self, batch: Batch, player: str = ONLY) -> Batch:
        """Make an extra pass ahead of `loss`, and return the batch that `loss` receives: masked or attacked images, for instance, and
        whatever else `loss` needs of the pass. Gradients flow through what it adds."""
        return batch

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the scalars of a batch: "loss" is minimised (a mean over the samples), the others are logged beside it.

        With several players it takes the player's name as well.

        Args:
            batch: "image" (B, C, H, W), "target" (B, ...), "index" (B,), on the learner's device; what `collate` makes of samples.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define loss")

    def regularize(self, batch: Batch, player: str, name: str) -> Tensor:
        """Return a player's lazy regularizer, a scalar. Every k steps the loop adds it, times k, to the loss (see `Player.lazy`)."""
        raise NotImplementedError(f"{type(self).__name__} does not define regularize")

    def stepper(self, settings: PlayerRecipe, player: str) -> Stepper:
        """Return what computes the gradients of a player's steps: one pass, or those that `optimizer.sam` of the recipe asks for."""
        return Stepper() if settings.optimizer.sam is None else SharpnessAware(settings.optimizer.sam)

    def forward(self, batch: Batch, player: str = ONLY, lazy: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Make all passes of a player's loss, and add the regularizers that `lazy` names; wrappers for several devices call it."""
        who = (player,) if has_players(self) else ()
        self.draws.restart()
        seen = self.first_pass(batch, *who)
        losses = self.loss(seen, *who)
        if not lazy:
            return losses
        terms = {name: self.regularize(seen, player, name) for name in lazy}
        total = losses["loss"] + sum(self.players()[player].lazy[name] * term for name, term in terms.items())
        return {**losses, **{name: term.detach() for name, term in terms.items()}, "loss": total}

    def noise(self, batch: Batch, *shape: int) -> Tensor:
        """Return standard normal numbers (B, *shape), one row a sample, which neither the number of processes nor other players change."""
        return self.draws.normal(positions_of(batch), *shape).to(batch["image"])

    def uniform(self, batch: Batch, *shape: int) -> Tensor:
        """Return uniform numbers in [0, 1), (B, *shape); otherwise like `noise`."""
        return self.draws.uniform(positions_of(batch), *shape).to(batch["image"])

    def eval_model(self) -> nn.Module:
        """The module that is averaged, evaluated and kept."""
        return self.model

    def before_step(self, step: int, total_steps: int) -> None:
        """Called ahead of optimizer step `step` (0, 1, ...)."""

    def after_step(self, step: int, total_steps: int) -> None:
        """Called after optimizer step `step` has changed the weights."""

    # ---- evaluation: the task's, unless a learner measures more

    def metrics(self) -> Any:
        """Return a fresh collection of metrics for `evaluate_batch`; None: none."""
        return self.task.metrics(self.model)

    def evaluate_batch(self, model: nn.Module, batch: Batch, metrics: Any) -> None:
        """Update the metrics by a batch of held-out samples, without gradients, in eval mode.

        Args:
            model: `eval_model()` or its moving average.
            batch: as for `loss`.
            metrics: from `metrics()`.
        """
        self.task.update(metrics, model, batch)

    def summary(self, metrics: Any) -> dict[str, Any]:
        """Return the metrics' values as plain numbers, and lists for what is more than a number."""
        return self.task.summary(metrics, self.model)

    # ---- samples

    def transform(self, augment: Augment | None) -> Callable[..., Any]:
        """Return the transform of an image to a tensor (C, H, W): with the recipe's augmentation in training, with None in evaluation.

        A transform with a true attribute `joint` is called with image and target and returns both (dense tasks, pairs of images).
        """
        from vitarium.data.transforms import train_transform

        return self.task.transform(self.model) if augment is None else train_transform(preprocessing_of(self.model), augment)

    @property
    def collate(self) -> Callable[[list[tuple[Tensor, Any]]], Batch]:
        """Function of samples (tensor, target) to a batch with "image" and "target"; of no samples: both empty. The task's by default."""
        return self.task.collate

    def pictures(self, model: nn.Module, batch: Batch) -> dict[str, Image.Image]:
        """Return drawings by name of the first held-out batch, made after each evaluation; the task's by default."""
        return self.task.sheets(model, batch)


def has_players(learner: Learner) -> bool:
    """Return whether a learner defines `players`; otherwise it has one, and `loss` takes the batch alone."""
    return type(learner).players is not Learner.players
