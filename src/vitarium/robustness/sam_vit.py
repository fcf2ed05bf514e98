"""Sharpness-aware training of vision transformers (Chen, Hsieh and Gong, "When Vision Transformers Outperform ResNets without Pre-training
or Strong Data Augmentations", ICLR 2022; the optimizer: Foret et al., "Sharpness-Aware Minimization", ICLR 2021).

ViTs and MLP-Mixers that are trained without strong augmentation converge to sharp minima. SAM minimises the worst loss in a ball,

    min over w of  max over |e| <= rho of  loss(w + e),      e = rho * g / |g|,   g = gradient at w,   the norm over the whole model

so a step takes the gradient at w + e and applies it at w. The paper reports 79.9 % instead of 74.6 % for ViT-B/16 on ImageNet-1k, and 77.4
instead of 66.4 % for Mixer-B/16, and that the loss around the weights is flatter and first layers are sparser.

In the training loop SAM is a setting of the optimizer, for every learner: `optimizer.sam: {rho: 0.1}` (recipe `sam_vit`; see
`vitarium.training.recipe.Sam`). This module has `SAM` for custom loops, the rho of each model, and two of the paper's measures; those of
the Hessian are in `sharpness.py`, drawings of the loss in `surface.py`, corruptions in `corruptions.py`.

Follows the SAM of davda54/sam and the paper. The released models (pretrained with SAM) are timm's `vit_base_patch16_224.sam_in1k` and
`vit_base_patch32_224.sam_in1k`. Google's own files load too, ViTs and Mixers: `create_model("timm/mixer_b16_224",
checkpoint="Mixer-B_16.npz")`. Flax computes GELU by its tanh approximation, timm's models exactly; timm's conversions leave this so.
Cost: two forward and backward passes per step, and one more copy of the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.errors import InputError, UsageError
from vitarium.training.optim import move_back, move_uphill
from vitarium.training.recipe import Sam
from vitarium.training.settings import check
from vitarium.training.steppers import SharpnessAware

RHO = {
    "timm/vit_small_patch32_224": 0.05,
    "timm/vit_small_patch16_224": 0.1,
    "timm/vit_small_patch8_224": 0.15,
    "timm/vit_base_patch32_224": 0.15,
    "timm/vit_base_patch16_224": 0.2,
    "timm/mixer_s32_224": 0.1,
    "timm/mixer_s16_224": 0.15,
    "timm/mixer_b32_224": 0.35,
    "timm/mixer_b16_224": 0.6,
}
"""Best rho for each of the paper's models trained from scratch; larger models and Mixers need larger values."""


class SAM:
    """Sharpness-aware steps with any optimizer, for custom training loops.

        sam = SAM(torch.optim.AdamW(model.parameters(), lr=1e-3), rho=0.1)
        loss = sam.step(lambda: criterion(model(image), target))

    or, with explicit passes:

        criterion(model(image), target).backward()
        sam.first_step()                               # perturb the weights
        with frozen_statistics(model):
            criterion(model(image), target).backward()
        sam.second_step()                              # restore the weights, step with the second gradient

    Weight decay, momentum and clipping (between the second backward and `second_step`) act on the second gradient. With a gradient scaler,
    unscale before each of the two steps. SAM has no state between two steps; state dicts are those of the optimizer.

    Args:
        optimizer: takes the step.
        rho: length of the perturbation, over all parameters of all groups together; 0: none.
        adaptive: measure it relative to each weight's magnitude (ASAM).

    Raises:
        UsageError: rho is negative or not finite.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rho: float = 0.05, adaptive: bool = False):
        self.optimizer = optimizer
        self.settings = check(Sam, {"rho": rho, "adaptive": adaptive}, "SAM")
        self._before: list[tuple[Tensor, Tensor]] | None = None

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def first_step(self) -> None:
        """Move the weights uphill along their gradients, and clear these.

        Raises:
            UsageError: the weights are already perturbed.
        """
        if self._before is not None:
            raise UsageError("first_step was called twice; call second_step in between, which restores the weights")
        self._before = move_uphill(self._parameters(), self.settings)
        self.optimizer.zero_grad()

    def second_step(self) -> None:
        """Restore the weights, take the optimizer's step with the current gradients, and clear these.

        Raises:
            UsageError: the weights are not perturbed.
        """
        if self._before is None:
            raise UsageError("second_step comes after first_step and a second backward pass")
        move_back(self._before)
        self._before = None
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Make both passes, by the training loop's stepper; returns the loss of the weights before the step, detached.

        Args:
            closure: computes the loss, a scalar, of the same batch each time (this calls backward).

        Raises:
            UsageError: the weights are perturbed.
        """
        if self._before is not None:
            raise UsageError("step makes both passes; second_step comes after first_step")
        self.optimizer.zero_grad()
        with torch.enable_grad():
            losses = SharpnessAware(self.settings).gradients(_Closure(self, closure))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses["loss"]


class _Closure:
    """Adapter of a closure to the training loop's stepper; implements `vitarium.training.steppers.Passes`."""

    def __init__(self, sam: SAM, closure: Callable[[], Tensor]):
        self.parameters, self.zero_grad, self.closure = list(sam._parameters()), sam.optimizer.zero_grad, closure

    def buffers(self) -> Iterable[Tensor]:
        return ()  # `frozen_statistics` keeps those of batch norms

    def accumulate(self) -> dict[str, Tensor]:
        loss = self.closure()
        loss.backward()
        return {"loss": loss.detach()}


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of a model's batch norms within the context; they normalise by the batch, as in training."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        yield
    finally:
        move_back(kept)


@torch.no_grad()
def noise_sharpness(model: nn.Module, loss: Callable[[], Tensor], *, sigma: float = 0.01, draws: int = 10, seed: int = 0) -> float:
    """Return the mean increase of the loss when Gaussian noise of this standard deviation is added to every weight.

    Args:
        model: its parameters are changed, and restored bit for bit.
        loss: returns the loss of the current weights, a scalar; without dropout, whose noise would be measured as well.
    """
    parameters = list(model.parameters())
    before = [(p, p.detach().clone()) for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    base, risen = float(loss()), 0.0
    try:
        for _ in range(draws):
            for p, values in before:
                p.copy_(values + sigma * torch.randn(p.shape, generator=generator).to(p))
            risen += float(loss()) - base
    finally:
        move_back(before)
    return risen / draws


@torch.no_grad()
def active_neurons(model: nn.Module, images: Iterable[Tensor] | Tensor) -> dict[str, float]:
    """Return the share of hidden units with a positive input to their activation, by the activation's name, in the model's order.

    Args:
        model: a model with activation modules (GELU, ReLU and the like), such as timm's and ours; set to eval mode.
        images: batches (B, C, H, W), or one.

    Raises:
        InputError: the model has no such modules.
    """
    kinds = (nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU)
    sites = {name: m for name, m in model.named_modules() if isinstance(m, kinds) or type(m).__name__ in ("GELU", "QuickGELU", "GELUTanh")}
    if not sites:
        raise InputError(f"{type(model).__name__} has no activations that are modules (GELU, ReLU, SiLU, ...)")
    positive, total = dict.fromkeys(sites, 0.0), dict.fromkeys(sites, 0)

    def counter(name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            positive[name] += float((inputs[0] > 0).sum())
            total[name] += inputs[0].numel()

        return count

    hooks = [module.register_forward_pre_hook(counter(name)) for name, module in sites.items()]
    training = model.training
    try:
        model.eval()
        for batch in [images] if isinstance(images, Tensor) else images:
            model(batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {name: positive[name] / total[name] for name in sites if total[name]}
