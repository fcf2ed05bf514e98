"""DependencyViT: reversed self-attention that induces a tree of patches (Ding et al., "Visual Dependency Transformers", CVPR 2023).

The idea: in a ViT each token gathers values from others; here each token (child) sends its value to others (parents). It distributes one
unit of message over the parents, and the new value of a token is the sum of the messages that it receives. A selector chooses the head by
which a token sends; a controller scales its messages, and a token that is switched off stays off in later layers. The parent with the
largest share defines a tree over the patches, learned without labels, whose leaves can be pruned.

    F = softmax_j(q_i k_j / sqrt(d))          row i: distribution of the message of child i over the parents j
    p_i = softmax_h(W_p x_i / 0.1)            a nearly hard choice of one head
    m_i = m_i(previous layer) sigmoid(MLP(x_i) + b)                                         initially m_i = 1
    y_j = sum_i F_h[i, j] p_i[h] m_i v_i      for each head h;   x = x + LS(W_o y), followed by the usual MLP
    A[j, i] = sum_h F_h[i, j] p_i[h] m_i      dependency mask: message from child i to parent j; column i sums to m_i

`dependencyvit_lite_*` prune tokens: between attention and MLP of four blocks, the tokens that received least are removed, 16 % of all
tokens each time, so that 36 % remain in the last blocks. The number of tokens depends only on the image size: shapes are static, and the
model compiles and exports.

No code was published. The implementation follows the paper's abstract and figures and, for details that they leave open, an unmerged
third-party port to timm (no biases in selector and controller; pruning by received mass; mean of m_i x_i as image feature, `pool="mean"`).
Choices of this library, each with an option: b = 4 inside the controller's sigmoid (`message_bias`; with 0, as in the port, a newly
initialised layer halves the messages, and 0.02 % remain after twelve); the feature is sum m_i x_i / sum m_i (`pool="weighted"`); the tree
is the maximum spanning arborescence of the mean mask. Any image size: the position table is resampled.
Cost: quadratic in tokens. The fused attention kernel cannot be used, because the matrix is transposed between softmax and product.

Speed: p and m scale the messages before they are sent, N d values instead of N^2; the received mass is an additional channel of the
messages; in plain inference the matrix is computed in pieces that fit the cache, so that memory is linear in N.

Legend: B batch, N patches (n of them remaining), C channels, H heads, d = C / H.

Files: `attention`, `blocks` (with the state that is passed between them), `dependency` (masks and tree of a forward pass), `model`.
"""

from vitarium.backbones.dependencyvit.attention import ReversedAttention
from vitarium.backbones.dependencyvit.blocks import Flow, start
from vitarium.backbones.dependencyvit.dependency import Dependency, build_tree
from vitarium.backbones.dependencyvit.model import DependencyViT, kept_shares

__all__ = ["Dependency", "DependencyViT", "Flow", "ReversedAttention", "build_tree", "kept_shares", "start"]
