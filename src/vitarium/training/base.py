"""The interface between a learner and the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from vitarium.catalog.calling import Inputs, inputs_of
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
    """Base class of learners: holds the model and everything else that its training needs, and computes the loss of a batch.

    The loop handles devices, precision, optimizer, rates, accumulation, clipping, moving average, evaluation, logs and checkpoints. A new
    learner is a subclass with a `loss`, registered for a task:

        @learner("brightness", task="encode")
        class Brightness(Learner):
            def loss(self, batch):
                return {"loss": (self.model(batch["image"]).mean(1) - batch["image"].mean((1, 2, 3))).square().mean()}

    Guarantees for subclasses:
    - `loss` runs under the recipe's precision, data-parallel if there are several processes, and after all generators were seeded from
    (seed, step, rank), so that a resumed run draws the same numbers. Persistent state must be in parameters and buffers. -
    `before_step(step, total)` is called before each step and `after_step(step, total)` after the weights have changed, for schedules of
    momentum or temperature and for teachers that are averages of their student. - Every parameter with `requires_grad` is trained: the
    model's with layer-wise rates, others (a projector, a decoder) at the full rate, unless the attribute `rates` maps a parameter's name to
    a share of the rate. - `eval_model()` returns the module that is averaged (EMA), evaluated and saved: the model, unless a subclass
    overrides it (a teacher, a generator).

    An adversarial learner trains several players, each with its optimizer: `players` returns them, and `loss(batch, player)` and
    `first_pass(batch, player)` then take the player's name as a second argument (see `vitarium.training.players`).

    Args:
        model: the model to train.
        settings: its settings; None: their defaults. A learner must be constructible from a loaded model alone, for `vitarium evaluate`.
    """

    objective: ClassVar[str] = ""
    """Name under which `@learner` registered it."""

    task_name: ClassVar[str] = "pretrain"
    """Task of the models that it trains, in the format of `parse_task`; set by `@learner(NAME, task=...)`."""

    usage: ClassVar[str | None] = None
    """Command to show after training, with {file} for the saved model; None: the task's."""

    class Settings(Section):
        """Settings of the learner: a recipe's `objective` without its name. Unknown keys are an error."""

    def __init__(self, model: nn.Module, settings: Any = None):
        super().__init__()
        self.model = model
        self.settings = settings if settings is not None else self.Settings()
        self._task: tuple[Any, Task] | None = None
        self.draws = Draws(0, 0, ONLY)  # the loop sets one for each step

    @classmethod
    def create(
        cls, name: str | nn.Module, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None
    ) -> Learner:
        """Create the learner with its model. Commands, claims and tests all use this method.

        Args:
            name: name of the model, or a model.
            data: its training data.
            recipe: gives sizes, arguments and the learner's settings.
            pretrained: start from published weights.
            checkpoint: start from these weights: file, "hf:OWNER/NAME", or address.

        Raises:
            UsageError, CheckpointError: unknown model, invalid arguments or settings, or weights that do not fit.
        """
        from vitarium.training.building import build_model

        settings = recipe.settings_of(cls)
        return cls(build_model(name, data, recipe, pretrained=pretrained, checkpoint=checkpoint), settings)

    @classmethod
    def task_for(cls, settings: Any) -> Task:
        """Return the task under these settings: options of the task that the settings have under the same name are taken from them."""
        from vitarium.training.tasks.registry import parse_task

        task = parse_task(cls.task_name)
        shared = {name: getattr(settings, name) for name in type(task).model_fields if name in type(settings).model_fields}
        return parse_task(task.record() | shared) if shared else task

    @property
    def task(self) -> Task:
        """The task of the model. It follows the settings, which a recipe may replace during training."""
        if self._task is None or self._task[0] is not self.settings:
            self._task = self.settings, self.task_for(self.settings)
        return self._task[1]

    @property
    def primary_metric(self) -> tuple[str, str]:
        """Name of the metric that selects the best evaluation, and "max" or "min"; by default the task's."""
        primary = self.task.primary
        return primary.name, primary.best

    def players(self) -> Mapping[str, Player]:
        """Return the players, each with its own optimizer steps, by name in the order of the steps; by default the learner as one
        player."""
        return {ONLY: Player(self, ema=self.eval_model())}

    def phases(self) -> Sequence[Phase]:
        """Return the learner's own phases, for recipes without any, such as one with frozen parameters (see `vitarium.training.phases`)."""
        return ()

    def first_pass(self, batch: Batch, player: str = ONLY) -> Batch:
        """Make an extra pass before `loss`, and return the batch for `loss`, for instance with masked or attacked images and other results
        of the pass. Gradients flow through the added values."""
        return batch

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the scalars of a batch: "loss" is minimised (a mean over the samples), the others are logged beside it.

        With several players it takes the player's name as well.

        Args:
            batch: "image" (B, C, H, W), "target" (B, ...), "index" (B,), on the learner's device; the result of `collate`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define loss")

    def regularize(self, batch: Batch, player: str, name: str) -> Tensor:
        """Return a player's lazy regularizer, a scalar. Every k steps the loop adds it, times k, to the loss (see `Player.lazy`)."""
        raise NotImplementedError(f"{type(self).__name__} does not define regularize")

    def stepper(self, settings: PlayerRecipe, player: str) -> Stepper:
        """Return the stepper that computes the gradients of a player's steps: one pass, or two if the recipe sets `optimizer.sam`."""
        return Stepper() if settings.optimizer.sam is None else SharpnessAware(settings.optimizer.sam)

    def forward(self, batch: Batch, player: str = ONLY, lazy: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Make all passes of a player's loss, and add the regularizers in `lazy`; wrappers for several devices call this method."""
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
        """Return standard normal numbers (B, *shape), one row per sample, independent of the number of processes and of other players."""
        return self.draws.normal(positions_of(batch), *shape).to(batch["image"])

    def uniform(self, batch: Batch, *shape: int) -> Tensor:
        """Return uniform numbers in [0, 1), (B, *shape); otherwise like `noise`."""
        return self.draws.uniform(positions_of(batch), *shape).to(batch["image"])

    def model_inputs(self, batch: Batch) -> Inputs:
        """Return the inputs with which the model is called for a batch, by name, as a quantizer's calibration needs them.

        By default the fields of the batch that the model's forward takes, or its image. The same batch gives the same inputs.

        Args:
            batch: as for `loss`, of the evaluation's `transform`, with "index".

        Raises:
            InputError: the batch lacks an input of the model.
        """
        return inputs_of(self.model, batch)

    def eval_model(self) -> nn.Module:
        """Return the module that is averaged, evaluated and saved."""
        return self.model

    def before_step(self, step: int, total_steps: int) -> None:
        """Called before optimizer step `step` (0, 1, ...)."""

    def after_step(self, step: int, total_steps: int) -> None:
        """Called after optimizer step `step` has changed the weights."""

    # ---- evaluation: by default the task's

    def metrics(self) -> Any:
        """Return a new collection of metrics for `evaluate_batch`, or None."""
        return self.task.metrics(self.model)

    def evaluate_batch(self, model: nn.Module, batch: Batch, metrics: Any) -> None:
        """Update the metrics by a batch of held-out samples, without gradients, in eval mode.

        Args:
            model: `eval_model()` or its moving average.
            batch: as for `loss`.
            metrics: from `metrics()`.
        """
        self.task.update(metrics, model, batch)

    def run_model(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on a batch as in evaluation. Statistics of batch norms are estimated so (see `vitarium.training.statistics`); a
        learner whose model has batch norms and takes more than an image overrides it.

        Args:
            model: `eval_model()` or its moving average.
            batch: as for `loss`.
        """
        return model(batch["image"])

    def summary(self, metrics: Any) -> dict[str, Any]:
        """Return the metrics' values as plain numbers or lists."""
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
        """Function from samples (tensor, target) to a batch with "image" and "target" (both empty without samples); by default the
        task's."""
        return self.task.collate

    def pictures(self, model: nn.Module, batch: Batch) -> dict[str, Image.Image]:
        """Return drawings by name of the first held-out batch, made after each evaluation; the task's by default."""
        return self.task.sheets(model, batch)


def has_players(learner: Learner) -> bool:
    """Return whether a learner defines `players`; otherwise it has one, and `loss` takes the batch alone."""
    return type(learner).players is not Learner.players
