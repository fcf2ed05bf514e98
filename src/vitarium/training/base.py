"""The contract between a training objective and the loop that drives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from vitarium.catalog.create import preprocessing_of
from vitarium.data.loader import stack
from vitarium.errors import UsageError
from vitarium.training.draws import Draws, positions_of
from vitarium.training.players import ONLY, Player, has_players
from vitarium.training.settings import Section
from vitarium.training.steppers import SharpnessAware, Stepper

if TYPE_CHECKING:
    from PIL import Image

    from vitarium.data import ImageData
    from vitarium.data.transforms import Augment
    from vitarium.training.recipe import PlayerRecipe, Recipe

Batch = dict[str, Any]


class Learner(nn.Module):
    """A training objective: holds its model (and whatever else it needs), and turns a batch into a loss.

    The loop owns everything else: devices, precision, optimizer, rates, accumulation, clipping, moving average, evaluation, logs and
    checkpoints. A new objective is a subclass with a `loss`:

        class Reconstruction(Learner):
            def loss(self, batch):
                return {"loss": (self.model(batch["image"]) - batch["image"]).square().mean()}

    What a subclass may count on:
    - `loss` runs under the recipe's precision, data-parallel where there are several processes, and after all generators were set
      from (seed, step, rank): whatever it draws from them is the same when a run is resumed. It keeps no state outside its
      parameters and buffers, or a resumed run would not know it.
    - `before_step(step, total)` is called ahead of each step and `after_step(step, total)` once the weights have changed: the place
      for schedules of momentum or temperature and for teachers that follow their student.
    - Every parameter with `requires_grad` is trained: `model`'s by its layers, others (a projector, a decoder) at the full rate, or at
      another: an attribute `rates` maps a parameter's name to its share of the rate.
    - `eval_model()` is what is averaged (EMA), evaluated and kept: the model, unless a subclass says otherwise (a teacher, a generator).

    An adversarial objective trains several players, each with its optimizer: `players` names them, and `loss(batch, player)` and
    `first_pass(batch, player)` then take the player's name as a second argument (see `vitarium.training.players`).

    Args:
        model: the model that training is about.
        settings: the objective's own numbers; None: their defaults. A learner must be made from a loaded model alone, because that is
            how `vitarium evaluate` and `vitarium predict` make it.
    """

    objective: ClassVar[str] = ""
    """The name under which `@learner` registered it."""

    class Settings(Section):
        """The objective's own numbers: a recipe's `objective` without its name."""

    data_task: ClassVar[str] = "class"
    """The kind of labels it learns from: the `task` of `open_data`."""

    default_data: ClassVar[str] = "digits"
    """What `vitarium evaluate` opens when no data are named."""

    usage: ClassVar[str] = "vitarium predict IMAGE --model {file}"
    """What a user does next with the trained file."""

    primary_metric = ("loss", "min")
    """The metric that says which evaluation was best, and whether more ("max") or less ("min") is better."""

    def __init__(self, model: nn.Module, settings: Any = None):
        super().__init__()
        self.model = model
        self.settings = settings if settings is not None else self.Settings()
        self.draws = Draws(0, 0, ONLY)  # the loop sets those of each step

    @classmethod
    def create(cls, name: str, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None) -> Learner:
        """What `vitarium train` trains: the learner with a new model.

        Args:
            name: of the model.
            data: what it will be trained on.
            recipe: for sizes, arguments and the objective's settings.
            pretrained: begin with published weights.
            checkpoint: begin with these: file, "hf:OWNER/NAME", or address.

        Raises:
            UsageError, CheckpointError: no such model, arguments that it does not take, weights that do not fit.
        """
        from vitarium.training.building import build_model

        model = build_model(name, data, recipe, pretrained=pretrained, checkpoint=checkpoint)
        return cls(model, recipe.settings_of(cls))

    def players(self) -> Mapping[str, Player]:
        """What takes optimizer steps of its own, by name, in the order of the steps; by default the learner as one player."""
        return {ONLY: Player(self, ema=self.eval_model())}

    def first_pass(self, batch: Batch, player: str = ONLY) -> Batch:
        """An extra pass ahead of `loss`: returns the batch that `loss` receives, such as masked or attacked images, with whatever else
        `loss` needs of it. Gradients flow through what it adds."""
        return batch

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars of a batch: "loss" is minimised (a mean over the samples), the others are logged beside it.

        With several players it takes the player's name as well.

        Args:
            batch: "image" (B, C, H, W), "target" (B, ...), "index" (B,), on the learner's device; what `collate` makes of samples.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define loss")

    def regularize(self, batch: Batch, player: str, name: str) -> Tensor:
        """A player's lazy regularizer, a scalar. The loop adds it to the player's loss at every k-th step, times k (see `Player.lazy`)."""
        raise NotImplementedError(f"{type(self).__name__} does not define regularize")

    def stepper(self, settings: PlayerRecipe, player: str) -> Stepper:
        """How the gradients of a player's steps are made: in one pass, or as `optimizer.sam` of the recipe says."""
        return Stepper() if settings.optimizer.sam is None else SharpnessAware(settings.optimizer.sam)

    def forward(self, batch: Batch, player: str = ONLY, lazy: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """All passes of a player's loss, through the wrappers that several devices need; `lazy` names the regularizers that are due."""
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
        """Standard normal numbers (B, *shape), a row a sample, which neither the number of processes nor other players change."""
        return self.draws.normal(positions_of(batch), *shape).to(batch["image"])

    def uniform(self, batch: Batch, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape); otherwise as `noise`."""
        return self.draws.uniform(positions_of(batch), *shape).to(batch["image"])

    def eval_model(self) -> nn.Module:
        """The module that is averaged, evaluated and kept."""
        return self.model

    def before_step(self, step: int, total_steps: int) -> None:
        """Called ahead of optimizer step `step` (0, 1, ...)."""

    def after_step(self, step: int, total_steps: int) -> None:
        """Called after optimizer step `step` has changed the weights."""

    def metrics(self) -> Any:
        """A fresh torchmetrics collection that `evaluate_batch` updates; it adds up over processes by itself. None: no metrics."""
        return None

    def evaluate_batch(self, model: nn.Module, batch: Batch, metrics: Any) -> None:
        """Update the metrics by a batch of held-out samples, without gradients, in eval mode.

        Args:
            model: `eval_model()` or its moving average.
            batch: as for `loss`.
            metrics: what `metrics()` gave.
        """

    def summary(self, metrics: Any) -> dict[str, Any]:
        """The metrics' values as plain numbers (and lists, for what is more than a number)."""
        return {} if metrics is None else {name: value.tolist() for name, value in metrics.compute().items()}

    # ---- samples

    def transform(self, augment: Augment | None) -> Callable[..., Any]:
        """How a picture becomes a tensor (C, H, W): for training with the recipe's augmentation, for evaluation with None.

        A transform with a true attribute `joint` is called with picture and target and gives both (dense tasks, pairs of pictures).
        """
        from vitarium.data.transforms import train_transform

        preprocessing = preprocessing_of(self.model)
        return preprocessing if augment is None else train_transform(preprocessing, augment)

    @staticmethod
    def collate(samples: list[tuple[Tensor, Any]]) -> Batch:
        """Samples (tensor, target) -> a batch with "image" and "target"; more entries are allowed. No samples: both empty."""
        return stack(samples)

    # ---- what people see

    def pictures(self, model: nn.Module, batch: Batch) -> dict[str, Image.Image]:
        """Pictures by name, drawn from the first held-out batch after each evaluation (in eval mode, without gradients)."""
        return {}

    def answers(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """What the model says of each picture of a batch, as plain values; entries whose name begins with "_" are for `picture_of` alone.

        Raises:
            UsageError: this objective's models have nothing to say of a picture.
        """
        raise UsageError(
            f"a model of the objective {self.objective!r} does not answer about pictures; 'vitarium predict' is for those that do"
        )

    def picture_of(self, picture: Image.Image, answer: dict[str, Any]) -> Image.Image | None:
        """An answer drawn over the picture that it is about; None: nothing to draw."""
        return None
