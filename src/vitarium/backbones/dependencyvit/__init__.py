"""DependencyViT: attention that runs backwards, so that a tree of parts appears (Ding et al., "Visual Dependency Transformers", CVPR 2023).

The idea: in a ViT each token takes from others; here each token (a child) gives: it has one unit of message, distributes it over the tokens
it wants to reach (its parents), and a token's new value is the sum of what it receives. A selector says by which head a token sends, a
controller whether it sends at all; who has stopped once stays silent. Whom a token sends most to is its parent: that is a tree over the
patches, learned without labels, whose leaves can be left out.

    F = softmax_j(q_i k_j / sqrt(d))          row i: how child i's unit is distributed over the parents j
    p_i = softmax_h(W_p x_i / 0.1)            a nearly hard choice of one head
    m_i = m_i(layer before) sigmoid(MLP(x_i) + b)                                           m_i = 1 in the beginning
    y_j = sum_i F_h[i, j] p_i[h] m_i v_i      for each head h;   x = x + LS(W_o y), then the MLP as usual
    A[j, i] = sum_h F_h[i, j] p_i[h] m_i      the dependency mask: what parent j has of child i; column i sums to m_i

`dependencyvit_lite_*` drop tokens: between attention and MLP of four blocks the tokens that received least leave, 16 % of all at a time, so
that 36 % go through the last blocks. Their number depends on the image's size alone: shapes are static, and the model compiles and exports.

No code was published. Followed: the paper's abstract and figures, and for what they leave open an unmerged third-party port to timm (no
biases in selector and controller; received mass decides who leaves; mean of m_i x_i as the image's feature, `pool="mean"`).
Free choices of ours, all switchable: b = 4 inside the controller's sigmoid (`message_bias`; with 0, as in the port, half of the messages
are lost in each fresh layer, and 0.02 % arrive behind the twelfth); the feature is sum m_i x_i / sum m_i (`pool="weighted"`); the tree is
the spanning arborescence of the mean mask that weighs most. Any image size, square or not: the position table is resampled.
Cost: quadratic in tokens. The fused attention kernel cannot be used, because the matrix is transposed between softmax and product.

How it is fast: p and m scale a message before it is sent, N d numbers and not N^2; what is received is one more channel of the messages;
in plain inference the matrix is made in pieces that fit the cache and are dropped at once, so that memory grows with N.

Legend: B batch, N patches (n of them left), C channels, H heads, d = C / H.

The house of files: `attention`, `blocks` (and the flow between them), `dependency` (masks and tree of a pass), `model`.
"""

from vitarium.backbones.dependencyvit.attention import ReversedAttention
from vitarium.backbones.dependencyvit.blocks import Flow, start
from vitarium.backbones.dependencyvit.dependency import Dependency, build_tree
from vitarium.backbones.dependencyvit.model import DependencyViT, kept_shares

__all__ = ["Dependency", "DependencyViT", "Flow", "ReversedAttention", "build_tree", "kept_shares", "start"]
