"""UniFormer: convolution at high resolution, attention at low resolution (Li et al., "Unifying Convolution and Self-attention", 2022).

The idea: all blocks of a four-stage pyramid have the same form, and only the relation aggregator R depends on the stage. In the first two
stages the affinity is local and independent of content (a 5 x 5 depth-wise kernel between two linear layers, with batch norm); in the last
two it is global and content-based (multi-head self-attention, with layer norm). Position information comes from convolutions alone.

    x <- x + DWConv_3(x)
    x <- x + R(Norm(x))             local: W2 DWConv_5(W1 x)        global: softmax(q k^T / sqrt(d)) v
    x <- x + MLP(Norm(x))

- `uniformer_video`: for clips; kernels have a time axis, attention is joint over time and space (or divided). Image weights are inflated
  by `vitarium.nn.inflate` or by loading an image checkpoint into a video model.
- `uniformer_xxs`, `uniformer_xs` (light): a class token scores the tokens; a block processes the best half and one token that represents
  the rest and whose change is added to them. The full map is restored after each block (as in Evo-ViT).
- `uniformer_video_light`: the light models for clips, whose scores compare the tokens of all frames.
- `uniformer_tl`: trained with token labels, with a second head for every token.
- `uniformer_dense`: maps of all stages are normed, for detection and segmentation; stage 3 uses window attention, or global attention in
  every fourth block and window attention in the others ("hybrid"). Windows are padded with zeros after the norm; the padding is not masked.

Follows the authors' code (github Sense-X/UniFormer); its checkpoints load by name. MixToken and the loss of token labelling are not part of
the model; `UniFormerTokenLabel.forward_dense` returns the outputs of both heads for them. Left out of the authors' constructors:
`representation_size`, with which they cannot be built (its layer is given the list of all widths), divided attention in the light video
models, which no released model uses, and the light models of detectors, with a norm on each map.
Cost: local stages are linear in pixels (and frames), global ones quadratic; windows make stage 3 linear too.

Speed: maps are channels-last in memory, so that 1 x 1 convolutions are linear layers and maps share their memory with tokens.

Legend: B batch, C channels, S the axes of a map (H, W or T, H, W), N tokens of a map, h heads.

Files: `blocks` (blocks, patches, checkpoint names), `image` (with token labels and dense maps), `light`, `video`.
"""

from vitarium.backbones.uniformer.image import UniFormer, UniFormerDense, UniFormerTokenLabel
from vitarium.backbones.uniformer.light import UniFormerLight, UniFormerVideoLight
from vitarium.backbones.uniformer.video import UniFormerVideo

__all__ = ["UniFormer", "UniFormerDense", "UniFormerLight", "UniFormerTokenLabel", "UniFormerVideo", "UniFormerVideoLight"]
