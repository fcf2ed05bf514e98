"""Explainers of the library captum behind our contract: `pip install 'vitarium[explain]'`.

Signed evidence is summed over channels, and evidence against the class counts as none. Where a method needs an image without evidence,
that is 0: the mean colour of what the model was trained on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitarium.errors import require
from vitarium.explanation.explainers import Explainer, explainer, share, whole


class CaptumExplainer(Explainer):
    """What they have in common.

    Raises:
        MissingExtra: captum is not installed.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.captum = require("captum.attr", "explain")

    def relevance(self, image: Tensor, target: Tensor | None) -> Tensor:
        wanted = self.choose(self.logits(image), target)
        with torch.enable_grad():
            evidence = self.attribute(image.requires_grad_(), wanted)
        return evidence.sum(dim=1).relu().to(image.dtype)

    def attribute(self, image: Tensor, target: Tensor) -> Tensor:
        """Evidence of every value of the image, (B, C, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} does not define attribute")


@explainer("integrated_gradients")
class IntegratedGradients(CaptumExplainer):
    """Integrated gradients (Sundararajan et al., 2017): gradients along the way from the mean colour to the image, times the way.

    Args:
        model: any classifier.
        steps: of the integral; as many passes forward and backward.
        batch_size: images a pass.
    """

    def __init__(self, model: nn.Module, steps: int = 32, batch_size: int = 32):
        super().__init__(model)
        self.steps, self.batch_size = whole("steps", steps), whole("batch_size", batch_size)

    def attribute(self, image: Tensor, target: Tensor) -> Tensor:
        method = self.captum.IntegratedGradients(self.logits)
        return method.attribute(image, target=target, n_steps=self.steps, internal_batch_size=max(self.batch_size, len(image)))


@explainer("occlusion")
class Occlusion(CaptumExplainer):
    """Occlusion (Zeiler and Fergus, 2014): what the logit loses when a window is covered by the mean colour.

    Args:
        model: any classifier; only its output is looked at.
        window: side, as a share of the image's, (0, 1].
        stride: step, as a share of the window's side, (0, 1].
        batch_size: covered images a pass.
    """

    def __init__(self, model: nn.Module, window: float = 0.2, stride: float = 0.5, batch_size: int = 32):
        super().__init__(model)
        self.window, self.stride = share("window", window), share("stride", stride)
        self.batch_size = whole("batch_size", batch_size)

    def attribute(self, image: Tensor, target: Tensor) -> Tensor:
        sides = [max(1, round(self.window * side)) for side in image.shape[-2:]]
        steps = [max(1, round(self.stride * side)) for side in sides]
        shapes: dict[str, Any] = dict(sliding_window_shapes=(image.shape[1], *sides), strides=(image.shape[1], *steps))
        at_once = max(1, self.batch_size // max(1, len(image)))
        with torch.no_grad():
            return self.captum.Occlusion(self.logits).attribute(image, target=target, perturbations_per_eval=at_once, **shapes)


@explainer("smooth_grad")
class SmoothGrad(CaptumExplainer):
    """SmoothGrad (Smilkov et al., 2017): the size of the gradient, averaged over noisy copies of the image.

    Args:
        model: any classifier.
        samples: noisy copies.
        noise: their standard deviation, as a share of the image's range, (0, 1].
        batch_size: images a pass.
    """

    def __init__(self, model: nn.Module, samples: int = 16, noise: float = 0.15, batch_size: int = 32):
        super().__init__(model)
        self.samples, self.noise, self.batch_size = whole("samples", samples), share("noise", noise), whole("batch_size", batch_size)

    def attribute(self, image: Tensor, target: Tensor) -> Tensor:
        tunnel = self.captum.NoiseTunnel(self.captum.Saliency(self.logits))
        spread = self.noise * float((image.max() - image.min()).detach())
        at_once = max(1, self.batch_size // max(1, len(image)))
        return tunnel.attribute(
            image, target=target, nt_type="smoothgrad", nt_samples=self.samples, nt_samples_batch_size=at_once, stdevs=spread
        )


@explainer("gradient_shap")
class GradientShap(CaptumExplainer):
    """Expected gradients: integrated gradients at random places of the way, with noise on the image (Lundberg and Lee, 2017).

    Args:
        model: any classifier.
        samples: places.
        noise: standard deviation on the image, in the model's units.
    """

    def __init__(self, model: nn.Module, samples: int = 32, noise: float = 0.05):
        super().__init__(model)
        self.samples, self.noise = whole("samples", samples), share("noise", noise)

    def attribute(self, image: Tensor, target: Tensor) -> Tensor:
        method = self.captum.GradientShap(self.logits)
        return method.attribute(image, torch.zeros_like(image[:1]), target=target, n_samples=self.samples, stdevs=self.noise)
