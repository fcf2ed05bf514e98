"""Sparse then Prune: fine-tuning with a penalty on attention, followed by magnitude pruning (Prasetyo et al. 2023).

Attention that is kept low and uniform during training survives pruning better. The loss of the authors' code is

    cross_entropy(logits, y) + 0.01 mean log(1 + A^2)      A: attention weights of the last block, over images, heads, queries and keys

and afterwards the share p of *all* weights with the smallest |w| becomes zero, with one threshold for the whole network: patch convolution,
projections, MLPs, the norms of blocks and the classifier; not biases, class token, positions and the last norm. No training follows.

Rows of A sum to one, so the term is smallest for uniform attention and largest (log(2) / N) if each query attends to one token: it makes
attention uniform, not sparse. At 577 tokens it is about 1e-5, which a factor of 0.01 makes nearly nothing. `AttentionPenalty` (penalty.py)
offers other penalties, and all blocks.

Followed: the authors' code (yogiprsty/Sparse-ViT), whose files load into `sparse_prune_base`. Added, because zeros alone save no time:
removal of heads and hidden channels (structure.py), N:M patterns, masks that survive training (masks.py).

    vitarium.apply(model, "sparse_prune:amount=0.5")                    half of the weights zero; dense kernels take as long as before
    vitarium.apply(model, "sparse_prune:structure=both,amount=0.5")     half of the heads and hidden channels removed: 1.9x faster
    vitarium train sparse_prune --data DIR --set objective.amount=0.5   the penalty, and pruning during training
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from vitarium.catalog.applying import apply, cost_of, undo
from vitarium.catalog.methods import AttachReport, Method, method
from vitarium.catalog.options import Patterns, validated
from vitarium.catalog.probe import bytes_of
from vitarium.efficiency.pruning.inputs import input_sizes
from vitarium.efficiency.pruning.masks import Masks, chosen, keep_largest, keep_n_of_m, prunable, set_zeros, sparsity
from vitarium.efficiency.pruning.penalty import AttentionPenalty
from vitarium.efficiency.pruning.structure import Group, Kind, columns_of, find_groups, shrink, taken_out, unit_scores, units_kept, widened
from vitarium.efficiency.pruning.vit import SparseViT as SparseViT
from vitarium.errors import AttachError, UsageError
from vitarium.training import ClassificationLearner, Learner, Recipe, learner
from vitarium.training.base import Batch

UNITS: dict[str, tuple[Kind, ...]] = {"heads": ("heads",), "channels": ("channels",), "both": ("heads", "channels")}
CHANNEL_STEP = 8
"""Hidden widths are multiples of this, for efficient kernels."""


# ---- the method


@dataclass
class PruneReport(AttachReport):
    """Report of an attached pruning, with a summary of the weights.

    Args:
        note: the summary.
    """

    note: str = ""

    def __str__(self) -> str:
        return super().__str__() + (f"; {self.note}" if self.note else "")


def _as_pattern(structure: Any) -> Any:
    """Undo the YAML 1.1 reading of 2:4 as two minutes and four seconds."""
    return f"{structure // 60}:{structure % 60}" if isinstance(structure, int) else structure


@method("sparse_prune", kind="prune")
@validated
class SparsePrune(Method):
    """Remove weights, heads or hidden channels, without data or with a few images.

    Args:
        amount: share to remove, from 0 to below 1: of the weights, or of each layer's heads and hidden channels. 0 changes nothing. An N:M
            pattern implies it.
        structure: "weights": single weights, which become zero and save no time; "2:4" (or another N:M): all but 2 of every 4 inputs of
            linear layers, for sparse tensor cores; "heads", "channels" (hidden ones of MLPs), "both": the layers become smaller.
        scope: "global": one threshold for all layers; "layer": the same share of each; "auto": global for weights by magnitude (as in the
            paper), layer otherwise.
        score: "magnitude", or "activation": weights times the size of their inputs on `calibration` images (Wanda). Neither is always
            better: on a small ViT of digits magnitude keeps more.
        shrink: whether removed heads and channels leave smaller layers; False: their outgoing weights are zero, so that training can
            continue pruning them, and `make_permanent` removes them later.
        include, exclude: shell patterns, or parts, of the names of weights (or of attentions and MLPs), such as exclude=[head].
        calibration: images for score="activation", (B, C, H, W) or batches of them; not saved.
    """

    amount: Annotated[float, Field(ge=0, lt=1)] = 0.5
    structure: Annotated[str, BeforeValidator(_as_pattern)] = "weights"
    scope: Literal["auto", "global", "layer"] = "auto"
    score: Literal["magnitude", "activation"] = "magnitude"
    shrink: bool = True
    include: Patterns = ()
    exclude: Patterns = ()
    calibration: Any = field(default=(), metadata={"saved": False}, compare=False, repr=False)

    keeps_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.structure not in ("weights", *UNITS) and self.pattern is None:
            raise UsageError(f"structure must be weights, heads, channels, both or a pattern such as 2:4, got {self.structure!r}")
        if self.pattern is not None:
            implied = 1 - self.pattern[0] / self.pattern[1]
            if self.amount not in (implied, 0.5):
                raise UsageError(f"structure={self.structure} removes {implied:g} of the weights; leave amount={self.amount:g} out")
            object.__setattr__(self, "amount", implied)
        if self.score == "activation" and isinstance(self.calibration, tuple) and not self.calibration:
            object.__setattr__(self, "calibration", None)  # marks for the command line that images are needed

    def check_fits(self, model: nn.Module) -> None:
        if not (self.groups(model) if self.structure in UNITS else self.weights(model)):
            raise AttachError(f"{self.slug} found no module to change in a {type(model).__name__}")

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(n, m) of an N:M pattern."""
        found = re.fullmatch(r"(\d+):(\d+)", str(self.structure))
        n, m = (int(found[1]), int(found[2])) if found else (0, 0)
        return (n, m) if 0 < n < m else None

    @property
    def together(self) -> bool:
        """Return whether one threshold applies to all layers."""
        return self.scope == "global" or (self.scope == "auto" and self.structure == "weights" and self.score == "magnitude")

    # ---- candidates

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the weights that can become zero, by name."""
        plain = self.structure == "weights" and self.score == "magnitude"
        found = prunable(model, self.include, self.exclude, norms=plain)
        if plain:
            return found
        linear = {n: w for n, w in found.items() if isinstance(model.get_submodule(n.rpartition(".")[0]), nn.Linear)}
        return {n: w for n, w in linear.items() if self.pattern is None or w.shape[1] % self.pattern[1] == 0}

    def groups(self, model: nn.Module) -> list[Group]:
        """Return the attentions and MLPs whose units can be removed."""
        found = {group.name: group for group in find_groups(model, UNITS[self.structure])}
        return list(chosen(found, self.include, self.exclude).values())

    def inputs(self, model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor] | None:
        """Return the input magnitudes on the calibration images; None for magnitude.

        Raises:
            UsageError: there are no images.
        """
        if self.score == "magnitude":
            return None
        if self.calibration is None:
            raise UsageError("score=activation needs images: calibration=TENSOR or LOADER in Python, --data on the command line")
        from vitarium.efficiency.quantization.calibration import batches

        return input_sizes(model, layers, batches(self.calibration, 256, next(model.parameters()), model=model))

    def kept_units(self, model: nn.Module, groups: Sequence[Group], amount: float) -> dict[str, Tensor]:
        """Return, for each group, the indices of the kept units."""
        inputs = self.inputs(model, [group.out for group in groups])
        kept: dict[str, Tensor] = {}
        for kind in UNITS[self.structure]:
            scores = {g.name: unit_scores(model, g, inputs) for g in groups if g.kind == kind}
            kept |= units_kept(scores, amount, together=self.together, step=CHANNEL_STEP if kind == "channels" else 1)
        return kept

    def masks(self, model: nn.Module, amount: float) -> dict[str, Tensor]:
        """Return masks, True for kept weights, at a share between 0 and `amount` (N:M patterns are applied whole)."""
        if self.structure in UNITS:
            groups = self.groups(model)
            kept = self.kept_units(model, groups, amount)
            return dict(columns_of(model, group, kept[group.name]) for group in groups)
        weights = self.weights(model)
        inputs = self.inputs(model, [name.removesuffix(".weight") for name in weights])
        scores = {name: weight.detach().abs() for name, weight in weights.items()}
        if inputs is not None:
            scores = {n: s * inputs[layer].to(s) for n, s in scores.items() if (layer := n.removesuffix(".weight")) in inputs}
        if self.pattern is not None:
            return {name: keep_n_of_m(score, *self.pattern) for name, score in scores.items()}
        return keep_largest(scores, amount, together=self.together)

    # ---- attaching

    def attach(self, model: nn.Module) -> AttachReport:
        if self.structure in UNITS and self.shrink:
            return self._attach_smaller(model)
        kept = self.masks(model, self.amount)
        own = dict(model.named_parameters(remove_duplicate=False))
        before = {name: own[name].detach().clone() for name, mask in kept.items() if not mask.all()}
        set_zeros(own, kept)
        return PruneReport(self, tensors=before, sites=tuple(kept), note=self._note(model))

    def _attach_smaller(self, model: nn.Module) -> AttachReport:
        groups = self.groups(model)
        kept = self.kept_units(model, groups, self.amount)
        report = PruneReport(self, sites=tuple(g.name for g in groups))
        report.replaced = taken_out(model, groups, kept)
        report.state = {"units": {group.name: len(kept[group.name]) for group in groups}}
        report.note = "; ".join(
            f"{sum(g.units for g in some)} -> {sum(len(kept[g.name]) for g in some)} {kind}"
            for kind in UNITS[self.structure]
            if (some := [g for g in groups if g.kind == kind])
        )
        return report

    def rebuild(self, model: nn.Module, state: Mapping[str, Any]) -> AttachReport:
        """Create layers of the saved widths; zeros come with the weights."""
        if self.structure not in UNITS:
            return PruneReport(self, sites=tuple(self.weights(model)))
        groups = self.groups(model)
        if not self.shrink:
            return PruneReport(self, sites=tuple(f"{group.out}.weight" for group in groups))
        units = state.get("units", {})
        widened(model, [group for group in groups if units.get(group.name, group.units) < group.units])
        for group in groups:
            shrink(model, group, torch.arange(int(units.get(group.name, group.units))))
        return PruneReport(self, sites=tuple(g.name for g in groups), state=dict(state))

    def _note(self, model: nn.Module) -> str:
        found = sparsity(model)
        text = (
            f"{found.share:.1%} of {found.total / 1e6:.3g} M weights are zero, which saves no time and no memory in dense kernels "
            f"(packed they would take {found.packed_bytes / 1e6:.3g} of {found.bytes / 1e6:.3g} MB)"
        )
        return text + (f"; nothing is left of {', '.join(found.empty[:3])}" if found.empty else "")


def make_permanent(model: nn.Module) -> nn.Module:
    """Make a pruning final: remove heads and channels whose outgoing weights are zero; keep zeros of single weights and free the original
    values. Returns the same model.

    Raises:
        UsageError: no pruning is on the model.
        AttachError, UnsupportedModel: see `SparsePrune`.
    """
    reports = list(getattr(model, "methods", ()))
    found = [report for report in reports if isinstance(report.method, SparsePrune)]
    if not found:
        raise UsageError("no sparse_prune is on this model; vitarium.apply(model, 'sparse_prune:...') first")
    report, pruning = found[0], found[0].method
    assert isinstance(pruning, SparsePrune)
    if pruning.structure in UNITS and not pruning.shrink:
        groups = pruning.groups(model)
        alive = {group.name: _alive(model, group) for group in groups}
        taken_out(model, groups, alive)
        report.method = dataclasses.replace(pruning, shrink=True)
        report.sites, report.state = tuple(alive), {"units": {name: len(index) for name, index in alive.items()}}
        report.macs_after, report.bytes_after = cost_of(model)
    report.tensors, report.replaced, report.can_undo = {}, {}, False
    return model


def _alive(model: nn.Module, group: Group) -> Tensor:
    weight: Any = model.get_submodule(group.out).weight
    heard = weight.detach().ne(0).view(len(weight), group.units, -1).any(2).any(0).nonzero().flatten()
    return heard if len(heard) else heard.new_zeros(1)  # layers of width 0 are not supported


def pruning_curve(
    model: nn.Module, measure: Callable[[nn.Module], float], amounts: Iterable[float] = (0.3, 0.5, 0.6, 0.7), **options: Any
) -> dict[float, float]:
    """Return `measure` of the model, pruned by each of the amounts; the model is unchanged afterwards.

    Args:
        model: without methods.
        measure: function of the model, such as lambda m: evaluate(m, data.val)["accuracy"].
        amounts: shares to remove.
        options: of `SparsePrune`.
    """
    found = {}
    for amount in amounts:
        apply(model, SparsePrune(amount=amount, **options), quiet=True)
        try:
            found[amount] = measure(model)
        finally:
            undo(model)
    return found


# ---- training


@learner("sparse_prune", task="classify")
class SparsePruneLearner(ClassificationLearner):
    """Classification with a penalty on attention, and pruning during training.

    Weights that a pruning on the model (`--apply sparse_prune:...`, or `amount` here) has set to zero stay zero. With `amount`, the share
    of zeros rises from `begin` to `end` of the training along amount (1 - (1 - t)^3) (Zhu and Gupta 2017), in steps of a hundredth of it;
    heads and channels are kept as zeros, and `make_permanent` removes them from the trained model.

    Raises:
        UsageError: an amount together with a moving average, whose zeros would not be zeros.
        UnsupportedModel: a penalty on a model that anatomy does not support (weight=0: any model).
    """

    class Settings(ClassificationLearner.Settings):
        """Settings of classification, and of pruning.

        Args:
            penalty, weight, blocks: see `AttentionPenalty`; weight 0 switches it off.
            amount, structure, scope: see `SparsePrune`; amount 0 prunes nothing.
            begin, end: shares of the training between which pruning takes place.
        """

        penalty: Literal["log1p_sq", "l1", "entropy", "hoyer"] = "log1p_sq"
        weight: float = 0.01
        blocks: Literal["last", "all"] = "last"
        amount: Annotated[float, Field(ge=0, lt=1)] = 0.0
        structure: str = "weights"
        scope: Literal["auto", "global", "layer"] = "auto"
        begin: Annotated[float, Field(ge=0, le=1)] = 0.1
        end: Annotated[float, Field(ge=0, le=1)] = 0.7

    def __init__(self, model: nn.Module, settings: Any = None, **options: Any):
        super().__init__(model, settings, **options)
        s = self.settings
        self.penalty = AttentionPenalty(s.penalty, s.weight, s.blocks)
        if s.weight:
            self.penalty.watched(model)
        self.pruning = SparsePrune(amount=s.amount, structure=s.structure, scope=s.scope, shrink=False) if s.amount else None
        done = list(getattr(model, "methods", ()))
        if self.pruning and not any(report.method.kind == "prune" for report in done):
            sites = tuple(self.pruning.masks(model, 0.0))
            size = bytes_of(model)
            model.methods = [PruneReport(self.pruning, sites=sites, bytes_before=size, bytes_after=size, can_undo=False), *done]  # type: ignore[assignment]
        self._masks: Masks | None = None

    @classmethod
    def create(cls, name: str | nn.Module, data: Any, recipe: Recipe, **options: Any) -> Learner:
        if recipe.ema and recipe.settings_of(cls).amount:
            raise UsageError("a moving average of weights that become zero during training is not zero: set ema=null or objective.amount=0")
        return super().create(name, data, recipe, **options)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        if not self.settings.weight:
            return super().loss(batch)
        with self.penalty.watch(self.model) as term:
            losses = super().loss(batch)
        penalty = term()
        return {"loss": losses["loss"] + penalty, "penalty": penalty}

    def amount_at(self, step: int, total_steps: int) -> float | None:
        """Return the share of zeros at a step; None if nothing is pruned at it."""
        s, every = self.settings, max(1, total_steps // 100)
        begin, end = round(s.begin * (total_steps - 1)), round(max(s.begin, s.end) * (total_steps - 1))
        if not s.amount or not begin <= step <= end or (step % every and step != end):
            return None
        left = (end - step) / max(1, end - begin)
        return s.amount * (1 - left**3)

    def before_step(self, step: int, total_steps: int) -> None:
        super().before_step(step, total_steps)
        amount = self.amount_at(step, total_steps)
        if self.pruning and amount is not None:
            set_zeros(dict(self.model.named_parameters(remove_duplicate=False)), self.pruning.masks(self.model, amount))
        pruned = any(report.method.kind == "prune" for report in getattr(self.model, "methods", ()))
        self._masks = Masks.of(self.model) if pruned else None
        if self._masks:
            self._masks.remember()

    def after_step(self, step: int, total_steps: int) -> None:
        if self._masks:
            self._masks.restore()
            self._masks = None
