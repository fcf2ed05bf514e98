"""UniFormer: convolution where tokens are many, attention where they are few (Li et al., "Unifying Convolution and Self-attention", 2022).

The idea: every block of a four-stage pyramid has the same three parts, and only the relation aggregator R changes with depth. In the
first two stages affinity is local and learned, whatever the content (a 5 x 5 depth-wise kernel between two linear layers, with batch
norm); in the last two it is global and by content (multi-head self-attention, with layer norm). Positions come from convolutions alone.

    x <- x + DWConv_3(x)
    x <- x + R(Norm(x))             local: W2 DWConv_5(W1 x)        global: softmax(q k^T / sqrt(d)) v
    x <- x + MLP(Norm(x))

- `uniformer_video`: the same on clips; kernels get a time axis, attention is joint over time and space (or divided). Image weights are
  inflated: `vitarium.nn.inflate`, or an image checkpoint given to a video model.
- `uniformer_xxs`, `uniformer_xs` (light): a class token scores tokens; a block works on the best half and on one token that stands for
  the rest, which moves along with it. Nothing is lost: the map is whole again behind each block (after Evo-ViT).
- `uniformer_tl`: trained with token labels; a second head reads each token.
- `uniformer_dense`: each stage's map is normed for detection and segmentation; stage 3 attends in windows, or globally in every fourth
  block and in windows in the others ("hybrid"). Windows are padded with zeros after the norm, which the softmax sees.

Follows the authors' code (github Sense-X/UniFormer), whose checkpoints load by name. Token labelling's MixToken and its loss belong to a
learner, which needs dense label maps; `UniFormerTokenLabel.forward_dense` gives it both heads.
Cost: stages of local blocks are linear in pixels (and frames), global ones quadratic; windows make stage 3 linear too.

How it is fast: maps lie channels-last in memory from the stem on, so that 1 x 1 convolutions are linear layers on the same bytes and a
map is its tokens without a copy.

Legend: B batch, C channels, S the axes of a map (H, W or T, H, W), N tokens of a map, h heads.

The house of files: `blocks` (both kinds, patches, names), `image` (with token labels and dense maps), `light`, `video`.
"""

from vitarium.backbones.uniformer.image import UniFormer, UniFormerDense, UniFormerTokenLabel
from vitarium.backbones.uniformer.light import UniFormerLight
from vitarium.backbones.uniformer.video import UniFormerVideo

__all__ = ["UniFormer", "UniFormerDense", "UniFormerLight", "UniFormerTokenLabel", "UniFormerVideo"]
