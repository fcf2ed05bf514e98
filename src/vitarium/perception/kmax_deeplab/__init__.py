"""kMaX-DeepLab: queries are cluster centres, and cross attention is a step of k-means (Yu et al., "k-means Mask Transformer", 2022).

A mask transformer's queries represent the image's segments, and its masks assign pixels to queries. A query therefore need not
attend to all pixels by a softmax over them: each pixel is assigned to the query whose mask is largest there (a softmax over the few
queries, made hard), and a query receives the sum of its pixels.

    A = onehot(argmax over queries of masks)         (L x HW), no gradient
    q <- q + A V                                     then self-attention and an FFN

The logits of the assignment are the prediction itself, so that supervision at every layer trains the clustering. Axial attention computes
the maps from coarse to fine; two layers cluster each of them at strides 32, 16 and 8, and the last prediction is made at stride 4. Masks
divide each pixel among the queries, so they do not overlap; queries without a matching segment are trained to be void.

    matching: argmax of sum of p(class) * dice, once, on the last prediction, for all layers

Follows the authors' PyTorch code (github bytedance/kmax-deeplab), whose checkpoints load by name, with ConvNeXt or ResNet-50 below.
Left out: separate matchings of the layers, losses without deep supervision, other kinds of layers in the pixel decoder, and powers in the
order of the segments; no configuration of theirs uses them.
Cost: k-means is linear in pixels; axial attention is linear in pixels times the side of its map, and only at strides 32 and 16.

Notation: B batch, L queries, K classes, C channels, H W image, h w a map, D mask_dim.

Files: `parts`, `pixel_decoder`, `decoder` (k-means layers), `model`, `names` (of the authors' files), `losses`, `learner`.
"""

from vitarium.perception.kmax_deeplab.decoder import assign, cluster_sums
from vitarium.perception.kmax_deeplab.learner import KMaXLearner
from vitarium.perception.kmax_deeplab.model import KMaXDeepLab

__all__ = ["KMaXDeepLab", "KMaXLearner", "assign", "cluster_sums"]
