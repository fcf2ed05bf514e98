"""Dependency trees as an explanation: the root patch, and how strongly each other patch is connected to it."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor, nn

from vitarium import anatomy
from vitarium.catalog.preprocessing import Preprocessing
from vitarium.explanation.explainers import Explainer, explainer
from vitarium.explanation.heatmap import seen_box
from vitarium.explanation.reading import covered
from vitarium.explanation.simple import attention_of_blocks
from vitarium.explanation.tree_drawing import draw_tree
from vitarium.nn.modes import evaluating
from vitarium.ops.token_tree import TokenTree, grow_tree


@explainer("token_tree")
class TreeOfTokens(Explainer):
    """Map of the weakest edge between each patch and the root of the dependency tree.

    A model with `dependency_trees` (DependencyViT, in which a token depends on the tokens that it sends to) supplies the trees. For any
    other plain vision transformer they are built from attention averaged over heads and blocks: a token depends on the tokens it attends
    to. Trees do not depend on a class. `vitarium explain` draws the tree over the image, with the largest branches in colours.

    Args:
        model: a plain vision transformer that keeps all its tokens, or a model with `dependency_trees`.

    Raises:
        UnsupportedModel: any other model.
    """

    by_class = False
    has_scale = False

    def __init__(self, model: nn.Module):
        super().__init__(model)
        if not hasattr(model, "dependency_trees"):
            anatomy.of(model)

    def trees(self, image: Tensor) -> list[TokenTree]:
        """Return one tree for each image of a batch (B, C, H, W)."""
        if hasattr(self.model, "dependency_trees"):
            return self.model.dependency_trees(image)  # type: ignore[operator]
        view = anatomy.of(self.model)
        size = (image.shape[-2], image.shape[-1])
        looks_at = torch.stack(attention_of_blocks(self.model, image)[1]).mean(0)[:, view.prefix :, view.prefix :]
        patches = looks_at.detach().transpose(1, 2).double().cpu().numpy()
        return [grow_tree(mask, view.grid(*size), view.patch_size[0], size) for mask in patches]

    def relevance(self, image: Tensor, target: Tensor | None) -> Tensor:
        return torch.stack([torch.from_numpy(tree.reach()) for tree in self.trees(image)]).to(image)

    def cover(self, maps: Tensor, size: tuple[int, int]) -> tuple[int, int]:
        return covered(self.model, 0, (maps.shape[1], maps.shape[2]), size)

    def picture(self, picture: Image.Image, image: Tensor, heat: Tensor, preprocessing: Preprocessing | None) -> Image.Image:
        with evaluating(self.model):
            (tree,) = self.trees(image[None])
        return draw_tree(tree, picture, seen_box(picture.size, preprocessing))
