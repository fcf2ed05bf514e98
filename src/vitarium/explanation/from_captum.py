"""Explainers of the library captum: `pip install 'vitarium[explain]'`.

Attributions are summed over channels, and negative ones are set to 0. The baseline image is 0, the mean colour of the model's training
data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitarium.errors import require
from vitarium.explanation.explainers import Explainer, explainer, share, whole


class CaptumExplainer(Explainer):
    """Base of explainers that call captum.

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
        """Return the attribution of every value of the image, (B, C, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} does not define attribute")


@explainer("integrated_gradients")
class IntegratedGradients(CaptumExplainer):
    """Integrated gradients (Sundararajan et al., 2017): gradients along the line from the mean colour to the image, times the difference.

    Args:
        model: any classifier.
        steps: of the integral; each takes a forward and a backward pass.
        batch_size: images per pass.
    """

    def __init__(self, model: nn.Module, steps: int = 32, batch_size: int = 32):
        super().__init__(model)
        self.steps, self.batch_size = whole("steps", steps), whole("batch_size", batch_size)

    def attribute(self, image: Tensor, target: Tensor) -> Tensor:
        method = self.captum.IntegratedGradients(self.logits)
        return method.attribute(image, target=target, n_steps=self.steps, internal_batch_size=max(self.batch_size, len(image)))


@explainer("occlusion")
class Occlusion(CaptumExplainer):
    """Occlusion (Zeiler and Fergus, 2014): loss of the logit when a window is covered by the mean colour.

    Args:
        model: any classifier; only its output is used.
        window: side as a share of the image's, above 0 and up to 1.
        stride: step as a share of the window's side, above 0 and up to 1.
        batch_size: covered images per pass.
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
    """SmoothGrad (Smilkov et al., 2017): magnitude of the gradient, averaged over noisy copies of the image.

    Args:
        model: any classifier.
        samples: number of noisy copies.
        noise: standard deviation as a share of the image's range, above 0 and up to 1.
        batch_size: images per pass.
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
    """Expected gradients: integrated gradients at random points of the line, with noise on the image (Lundberg and Lee, 2017).

    Args:
        model: any classifier.
        samples: number of points.
        noise: standard deviation on the image, in the model's units.
    """

    def __init__(self, model: nn.Module, samples: int = 32, noise: float = 0.05):
        super().__init__(model)
        self.samples, self.noise = whole("samples", samples), share("noise", noise)

    def attribute(self, image: Tensor, target: Tensor) -> Tensor:
        method = self.captum.GradientShap(self.logits)
        return method.attribute(image, torch.zeros_like(image[:1]), target=target, n_samples=self.samples, stdevs=self.noise)
