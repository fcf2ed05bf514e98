"""Parameter groups, optimizers, perturbations (SAM), clipping, moving averages."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.errors import UsageError
from vitarium.training.lars import LarsMae
from vitarium.training.recipe import Clip, Ema, Optimizer, Sam

OWN_OPTIMIZERS: dict[str, Any] = {"lars_mae": LarsMae}
"""Optimizers by their name in a recipe that timm does not have, or has as another function."""


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Return the share of the rate of each parameter under layer-wise decay: decay^(last - layer).

    Layers come from the model's `group_matcher` (timm's convention): a dict of patterns, or a function from a parameter's name to its
    layer, whose numbers are then used unchanged (the authors of ConvNeXt skip numbers in their smaller models).

    Raises:
        UsageError: the model has no `group_matcher`.
    """
    from timm.models import group_parameters

    if not hasattr(model, "group_matcher"):
        raise UsageError(f"{type(model).__name__} has no group_matcher, which layer-wise decay needs; set optimizer.layer_decay=null")
    group_matcher: Any = model.group_matcher
    matcher = group_matcher(coarse=False)
    names = [name for name, _ in model.named_parameters()]
    numbered = callable(matcher) and all(isinstance(matcher(name), int) for name in names)
    layers: dict[str, int] = {n: matcher(n) for n in names} if numbered else group_parameters(model, matcher, reverse=True)
    last = max(layers.values(), default=0)
    return {name: decay ** (last - layers.get(name, last)) for name in names}


def parameter_groups(learner: nn.Module, settings: Optimizer, parameters: Iterable[Tensor] | None = None) -> list[dict[str, Any]]:
    """Return groups of a learner's trainable parameters, each parameter once, by layer and by whether weight decay applies.

    Tensors with fewer than two axes and those in `model.no_weight_decay()` (shell patterns allowed) have no decay. Layer-wise decay applies
    to `learner.model`; other parameters have the full rate, or their share of it in `learner.rates`.

    Args:
        parameters: a subset of the learner's parameters; None: all.

    Raises:
        UsageError: none of them requires gradients, or the model has no layers for `layer_decay`.
    """
    meant = None if parameters is None else {id(parameter) for parameter in parameters}
    model = getattr(learner, "model", None)
    scales: dict[str, float] = {}
    rates: dict[str, float] = getattr(learner, "rates", {})
    exempt: list[str] = []
    if isinstance(model, nn.Module):
        if settings.layer_decay is not None and settings.layer_decay < 1:
            scales = {f"model.{name}": scale for name, scale in layer_scales(model, settings.layer_decay).items()}
        named: Any = getattr(model, "no_weight_decay", set)
        exempt = [f"model.{name}" for name in named()]
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in learner.named_parameters():
        if not parameter.requires_grad or (meant is not None and id(parameter) not in meant):
            continue
        free = parameter.ndim < 2 or any(name == e or fnmatch.fnmatchcase(name, e) for e in exempt)
        decay, scale = 0.0 if free else settings.weight_decay, scales.get(name, rates.get(name, 1.0))
        group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    if not groups:
        raise UsageError(f"{type(learner).__name__} has no parameters to train")
    return list(groups.values())


def create_optimizer(learner: nn.Module, settings: Optimizer, parameters: Iterable[Tensor] | None = None) -> torch.optim.Optimizer:
    """Create the recipe's optimizer over a learner's parameters, or some of them; fused if torch supports it."""
    from timm.optim import create_optimizer_v2, get_optimizer_info

    given: dict[str, Any] = {name: getattr(settings, name) for name in ("betas", "eps", "momentum") if getattr(settings, name) is not None}
    if settings.name in ("adamw", "adam", "sgd"):
        given["fused"] = True
    own = settings.name in OWN_OPTIMIZERS
    if settings.momentum == 0 and not own and (get_optimizer_info(settings.name).defaults or {}).get("nesterov"):
        given["nesterov"] = False  # torch refuses it without momentum; what is left is plain SGD
    groups = parameter_groups(learner, settings, parameters)
    shared: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, **given}
    optimizer: torch.optim.Optimizer
    try:
        optimizer = OWN_OPTIMIZERS[settings.name](groups, **shared) if own else create_optimizer_v2(groups, settings.name, **shared)
    except (TypeError, ValueError, IndexError, AssertionError, ImportError) as error:  # each optimizer raises its own error type
        raise UsageError(f"optimizer {settings.name!r} refuses its settings: {error} (try without betas, eps, momentum)") from error
    for group in optimizer.param_groups:
        group.setdefault("lr_scale", 1.0)
    return optimizer


def norms_of(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the norm of each tensor, (N,), and the total norm, a scalar."""
    norms = torch.stack(torch._foreach_norm(tensors))
    total = norms.norm()
    if hasattr(total, "full_tensor"):  # of tensors sharded over processes
        norms, total = norms.full_tensor(), total.full_tensor()
    return norms, total


@torch.no_grad()
def move_uphill(parameters: Iterable[Tensor], sam: Sam) -> list[tuple[Tensor, Tensor]]:
    """Perturb the weights by a vector of length rho along their gradients; return (parameter, previous values) of those with a gradient.

    The move is rho * g / |g|, or with `adaptive` rho * w^2 * g / | |w| g |; norms are over all parameters together.
    """
    moved = [p for p in parameters if p.grad is not None]
    before = [(p, p.detach().clone()) for p in moved]
    slopes: Any = [p.grad for p in moved]
    sizes: Any = torch._foreach_abs(moved) if sam.adaptive else None
    slopes = torch._foreach_mul(slopes, sizes) if sam.adaptive else slopes
    step = sam.rho / (norms_of(slopes)[1] + 1e-12)
    slopes = torch._foreach_mul(slopes, sizes) if sam.adaptive else slopes
    torch._foreach_add_(moved, torch._foreach_mul(slopes, step))
    return before


@torch.no_grad()
def move_back(before: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Restore the weights from before `move_uphill`, bit for bit."""
    for parameter, values in before:
        parameter.copy_(values)


@contextlib.contextmanager
def uphill(parameters: Iterable[Tensor], buffers: Iterable[Tensor], sam: Sam) -> Iterator[None]:
    """Perturb the weights within the context; on exit, restore weights and buffers (the statistics of batch norms)."""
    kept = [(buffer, buffer.clone()) for buffer in buffers]
    before = move_uphill(parameters, sam)
    try:
        yield
    finally:
        move_back([*before, *kept])


def clip_gradients(parameters: Iterable[Tensor], clip: Clip) -> Tensor:
    """Clip the gradients in place; return their previous total norm, a scalar (not finite if any value is not)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms, total = norms_of(gradients)
    if clip.norm is not None:
        torch._foreach_mul_(gradients, (clip.norm / (total + 1e-6)).clamp(max=1.0))
    elif clip.tensor_norm is not None:
        torch._foreach_mul_(gradients, list((clip.tensor_norm / (norms + 1e-6)).clamp(max=1.0)))
    elif clip.value is not None:
        torch._foreach_clamp_max_(gradients, clip.value)
        torch._foreach_clamp_min_(gradients, -clip.value)
    return total


class Average:
    """Moving average of a model's parameters and batch norm statistics; other buffers are copied. `module` is the average, in eval mode.

    With warm-up the decay is 1 - (1 + step)^(-2/3), up to `decay`, as in timm's ModelEmaV3, so that the initial weights do not dominate in
    short trainings.
    """

    def __init__(self, model: nn.Module, settings: Ema):
        self.settings = settings
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        parts = list(zip(self.module.modules(), model.modules(), strict=True))
        norms = [pair for pair in parts if isinstance(pair[0], nn.modules.batchnorm._NormBase)]
        buffers = list(zip(self.module.buffers(), model.buffers(), strict=True))
        pairs: list[tuple[Tensor, Tensor]] = list(zip(self.module.parameters(), model.parameters(), strict=True))
        statistics = {id(b) for norm, _ in norms for b in norm.buffers(recurse=False) if b.is_floating_point()}
        pairs += [(a, b) for a, b in buffers if id(a) in statistics]
        self._copied = [(a, b) for a, b in buffers if id(a) not in statistics]
        # listed once, because traversing a model costs more than the update
        self._averages, self._sources = [a for a, _ in pairs], [b for _, b in pairs]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after step 1, 2, ..."""
        decay = min(self.settings.decay, 1 - (1 + step) ** (-2 / 3)) if self.settings.warmup else self.settings.decay
        torch._foreach_lerp_(self._averages, self._sources, 1 - decay)
        for average, source in self._copied:
            average.copy_(source)

    @torch.no_grad()
    def reset(self) -> None:
        """Restart from the model's current weights."""
        for average, source in [*zip(self._averages, self._sources, strict=True), *self._copied]:
            average.copy_(source)
