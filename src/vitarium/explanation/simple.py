"""Short explainers: attention rollout, Grad-CAM, gradient x input, RISE, and random maps as a baseline.

Notation: B batch, H heads, N tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium import anatomy
from vitarium.catalog.calibration import probabilities
from vitarium.errors import InputError
from vitarium.explanation.explainers import Explainer, explainer, share, whole
from vitarium.explanation.reading import as_map, covered, find_taps, logits_of, plain, read


@explainer("rollout")
class Rollout(Explainer):
    """Attention rollout (Abnar and Zuidema, 2020): contribution of each token to the class token through attention alone.

        R = product over blocks, last first, of (mean over heads of A + I) / 2        the class token's row of R

    For a model without a class token, which pools its tokens, the mean row is used. The map does not depend on the class.

    Args:
        model: a plain vision transformer (timm's, transformers', ours) that keeps all its tokens.

    Raises:
        UnsupportedModel: any other model.
    """

    by_class = False

    def __init__(self, model: nn.Module):
        super().__init__(model)
        anatomy.of(model)

    def relevance(self, image: Tensor, target: Tensor | None) -> Tensor:
        view = anatomy.of(self.model)
        output, weights = attention_of_blocks(self.model, image)
        self.choose(logits_of(self.model, output), target)
        whole_way = weights[0]
        for w in weights[1:]:
            whole_way = w @ whole_way
        row = whole_way[:, 0] if view.class_token else whole_way[:, view.prefix :].mean(dim=1)
        return as_map(row[..., None], (image.shape[-2], image.shape[-1]), view)[:, 0]

    def cover(self, maps: Tensor, size: tuple[int, int]) -> tuple[int, int]:
        return covered(self.model, None, (maps.shape[1], maps.shape[2]), size)


def attention_of_blocks(model: nn.Module, image: Tensor) -> tuple[Any, list[Tensor]]:
    """Return the model's output and, for each block, its attention with the residual path, mean over heads, (B, N, N).

    Rows sum to 1; class and other prefix tokens come first.

    Raises:
        UnsupportedModel: not a plain vision transformer.
        InputError: the blocks see different numbers of tokens.
    """
    view = anatomy.of(model)
    weights: list[Tensor] = []
    hooks = []
    for block in view.blocks:

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], block: anatomy.BlockView = block) -> None:
            x, *rest = args or (kwargs["hidden_states"],)
            weights.append(_attention(block, x, block.read_call(tuple(rest), kwargs), view.prefix))

        hooks.append(block.module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        output = model(image)
    finally:
        for hook in hooks:
            hook.remove()
    if len({w.shape for w in weights}) > 1:
        raise InputError("the blocks see different numbers of tokens, but every token is needed; remove the token reduction (undo)")
    return output, weights


def _attention(block: anatomy.BlockView, x: Tensor, call: dict[str, Any], prefix: int) -> Tensor:
    """Return a block's attention with the residual path, mean over heads, (B, N, N); rows sum to 1."""
    attention = block.attention
    q, k, v = attention.qkv(block.norm1(x))
    if (rope := call.get("rope")) is not None:
        q, k = (attention.rotate(t, rope, prefix).to(v.dtype) for t in (q, k))
    logits = q * attention.scale @ attention.repeat_kv(k).transpose(-2, -1)
    mean = logits.softmax(dim=-1).mean(dim=1)
    return (mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)) / 2


@explainer("grad_cam")
class GradCAM(Explainer):
    """Grad-CAM (Selvaraju et al., 2017) on maps or tokens: channels weighted by the mean gradient of the class's logit.

        w_c = mean over cells of d logit / d A_c        map = max(0, sum over c of w_c A_c)

    Args:
        model: any classifier.
        tap: the module whose output is A; None: the first norm of the last block of a plain vision transformer, the features before pooling
            of a model with `forward_features`, the last module that returns a map of any other.

    Raises:
        UsageError: no such module.
    """

    def __init__(self, model: nn.Module, tap: str | None = None):
        super().__init__(model)
        view = plain(model)
        self.split = tap is None and view is None and hasattr(model, "forward_features") and hasattr(model, "forward_head")
        self.tap = None if self.split else tap if tap is not None else find_taps(model, 1)[-1]
        self.view = view

    def relevance(self, image: Tensor, target: Tensor | None) -> Tensor:
        if self.split:  # the gradient passes through the head only
            a = self.model.forward_features(image).detach().requires_grad_()  # type: ignore[operator]
            with torch.enable_grad():
                logits = logits_of(self.model, self.model.forward_head(a))  # type: ignore[operator]
        else:
            with torch.enable_grad():
                logits, (a,) = read(self.model, image.requires_grad_(), [self.tap or 0])
        with torch.enable_grad():
            score = logits.gather(1, self.choose(logits, target)[:, None]).sum()
            (slope,) = torch.autograd.grad(score, a)
        size = (image.shape[-2], image.shape[-1])
        a, slope = (as_map(x.detach(), size, self.view if x.ndim == 3 else None) for x in (a, slope))
        return (slope.mean((2, 3), keepdim=True) * a).sum(dim=1).relu()

    def cover(self, maps: Tensor, size: tuple[int, int]) -> tuple[int, int]:
        info: Any = getattr(self.model, "feature_info", None)
        last = len(info) - 1 if self.split and info is not None else None
        return covered(self.model, last, (maps.shape[1], maps.shape[2]), size)


@explainer("gradient_input")
class GradientInput(Explainer):
    """Gradient of the class's logit times the image, summed over channels; negative values are set to 0."""

    def relevance(self, image: Tensor, target: Tensor | None) -> Tensor:
        with torch.enable_grad():
            image = image.requires_grad_()
            logits = self.logits(image)
            score = logits.gather(1, self.choose(logits, target)[:, None]).sum()
            (slope,) = torch.autograd.grad(score, image)
        return (slope * image).sum(dim=1).relu()


@explainer("rise")
class RISE(Explainer):
    """RISE (Petsiuk et al., 2018): probability of the class under random masks, averaged for each pixel over the masks that show it.

    Args:
        model: any classifier; only its output is used.
        masks: number of masks and of passes; the noise of the map falls with its square root.
        cells: cells per side of the coarse random grid.
        keep: share of visible cells, above 0 and up to 1.
        batch_size: masked images per pass.
        seed: seed of the masks.
    """

    def __init__(self, model: nn.Module, masks: int = 1000, cells: int = 7, keep: float = 0.5, batch_size: int = 64, seed: int = 0):
        super().__init__(model)
        self.masks, self.cells, self.keep = whole("masks", masks), whole("cells", cells), share("keep", keep)
        self.batch_size, self.seed = whole("batch_size", batch_size), whole("seed", seed, 0)

    def relevance(self, image: Tensor, target: Tensor | None) -> Tensor:
        wanted = self.choose(self.logits(image), target)
        generator = torch.Generator().manual_seed(self.seed)
        total = torch.zeros_like(image[:, 0])
        for start in range(0, self.masks, self.batch_size):
            masks = self.draw(min(self.batch_size, self.masks - start), (image.shape[-2], image.shape[-1]), generator).to(image)
            for i, (one, label) in enumerate(zip(image, wanted.tolist(), strict=True)):
                probability = probabilities(self.model, self.logits(one * masks[:, None]))[:, label]
                total[i] += torch.einsum("m,mhw->hw", probability, masks)
        return total / (self.masks * self.keep)

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Return smooth masks (count, H, W) in [0, 1]: a random coarse grid, enlarged and shifted by less than a cell."""
        cell = [-(-side // self.cells) for side in size]
        coarse = (torch.rand(count, 1, self.cells + 1, self.cells + 1, generator=generator) < self.keep).float()
        large = F.interpolate(coarse, [(self.cells + 1) * side for side in cell], mode="bilinear", align_corners=False)[:, 0]
        tops, lefts = (torch.randint(0, side, (count,), generator=generator).tolist() for side in cell)
        return torch.stack([m[t : t + size[0], x : x + size[1]] for m, t, x in zip(large, tops, lefts, strict=True)])


@explainer("random")
class Chance(Explainer):
    """Smooth noise, the score of a map without information.

    Args:
        model: any classifier; it is not used.
        cells: cells of noise per side.
        seed: seed of the noise, which differs between images.
    """

    by_class = False

    def __init__(self, model: nn.Module, cells: int = 7, seed: int = 0):
        super().__init__(model)
        self.cells = whole("cells", cells)
        self.generator = torch.Generator().manual_seed(whole("seed", seed, 0))

    def relevance(self, image: Tensor, target: Tensor | None) -> Tensor:
        return torch.rand(len(image), self.cells, self.cells, generator=self.generator).to(image)
