"""TNT: an inner transformer on sub-patches inside an outer transformer on patches (Han et al., "Transformer in Transformer", 2021).

The idea: each patch of 16 x 16 pixels (sentence) is divided into 16 sub-patches of 4 x 4 (words). In each block, an inner transformer mixes
the words of a sentence, their concatenation is projected and added to the sentence, and an outer transformer mixes the sentences. Words
have few channels, so the additional cost is small.

    w = w + A(LN w);  w = w + MLP(LN w)              among the 16 words of one sentence
    s = s + LN(P LN([w_1 ... w_16]))                 P linear without bias; not for the class token
    s = s + A(LN s);  s = s + MLP(LN s)

`PyramidTNT` (2022) has a convolutional stem for words and sentences, four stages of decreasing resolution, an inner transformer only in the
first block of a stage (and the second of a long one), and outer attention to averaged sentences with a learned bias per pair.

Follows the authors' code (github huawei-noah/Efficient-AI-Backbones, tnt_pytorch); its checkpoints and timm's load by name. Any image size:
incomplete patches are padded with zeros, position and bias tables are resampled. The inner norms of the pyramid run over all words of a
sentence jointly, as in the released models. Left out of the authors' constructors: dropout of positions, attention and MLPs (0 in all
released models, and without effect on outputs); the class of the norms.
Cost: quadratic in sentences, linear in words.

Speed: queries, keys and values are one product; attention runs in the fused kernel; `fuse()` folds the batch norms of the pyramid.

Legend: B batch, N sentences, C their channels, n = 16 words per sentence, c their channels.

Files: `blocks` (shared modules), `plain` (TNT), `pyramid` (PyramidTNT).
"""

from vitarium.backbones.tnt.plain import TNT, from_timm
from vitarium.backbones.tnt.pyramid import PyramidTNT

__all__ = ["TNT", "PyramidTNT", "from_timm"]
