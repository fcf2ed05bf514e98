"""The contract between a training objective and the loop that drives it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

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
    - Every parameter with `requires_grad` is trained: `model`'s by its layers, others (a projector, a decoder) at the full rate.
    - `eval_model()` is what is averaged (EMA), evaluated and kept: the model, unless a subclass says otherwise (a teacher, a generator).

    An adversarial objective needs several optimizers: its `loss` will give a list, one such dict a player, and name each player's
    parameters; the loop will step them in that order. Today's loop drives the form with one dict.

    Args:
        model: the model that training is about.
    """

    primary_metric = ("loss", "min")
    """The metric that says which evaluation was best, and whether more ("max") or less ("min") is better."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars of a batch: "loss" is minimised (a mean over the samples), the others are logged beside it.

        Args:
            batch: "image" (B, C, H, W), "target" (B, ...), "index" (B,), on the learner's device.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define loss")

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, through the wrappers that several devices need."""
        return self.loss(batch)

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
