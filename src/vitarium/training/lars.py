"""LARS as MoCo v3 and MAE use it for linear probes; timm's `lars` is another function of the same name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LarsMae(Optimizer):
    """Momentum SGD whose step for each tensor w of two or more axes is scaled to the length of w.

        u = g + decay w,   u <- u * trust |w| / |u|   (1 where either norm is zero),   m <- momentum m + u,   w <- w - lr m

    Tensors of fewer axes take m <- momentum m + g. timm's `lars` divides by |g| + decay |w| instead, and does not scale at all where the
    decay is 0, as in MAE's probe.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        weight_decay: decay, added to the gradient.
        momentum: in [0, 1).
        trust: trust coefficient.

    Source: facebookresearch/mae, util/lars.py.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.9, trust: float = 0.001
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters by their gradients; return the loss of the closure, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, update: Tensor, group: dict[str, Any]) -> None:
        if parameter.ndim > 1:
            update = update.add(parameter, alpha=group["weight_decay"])
            size, length = parameter.norm(), update.norm()
            scale = group["trust"] * size / length
            update = update * torch.where((size > 0) & (length > 0), scale, torch.ones_like(scale))
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        moving = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        parameter.add_(moving, alpha=-group["lr"])
