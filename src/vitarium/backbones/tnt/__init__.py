"""TNT: a transformer inside each patch feeds the one over patches (Han et al., "Transformer in Transformer", 2021; PyramidTNT, 2022).

The idea: a patch of 16 x 16 pixels (a sentence) is cut once more into 16 words of 4 x 4. In each block an inner transformer mixes the
words of a sentence, they are joined and added to the sentence, and an outer transformer mixes the sentences. Words are narrow, so that it
costs little.

    w = w + A(LN w);  w = w + MLP(LN w)              among the 16 words of each sentence, alone
    s = s + LN(P LN([w_1 ... w_16]))                 P linear without bias; the class token gets nothing
    s = s + A(LN s);  s = s + MLP(LN s)

`PyramidTNT` has words and sentences from convolutions, four stages of ever fewer sentences, inner parts in the first block of a stage
only (and the second of a long one), and outer attention to averaged sentences with a learned bias for each pair.

Follows the authors' code (github huawei-noah/Efficient-AI-Backbones, tnt_pytorch), whose checkpoints load by name; timm's do too. Any image
size: zeros fill the last patches, tables of positions and of pairs are resampled. The pyramid's norms inside a sentence run over all its
words, as released.
Cost: quadratic in sentences, linear in words.

How it is fast: queries, keys and values are one product, attention is the fused kernel; the pyramid's batch norms are folded by `fuse()`.

Legend: B batch, N sentences, C their channels, n = 16 words a sentence, c their channels.

The house of files: `blocks` (what both have), `plain` (TNT), `pyramid` (PyramidTNT).
"""

from vitarium.backbones.tnt.plain import TNT, from_timm
from vitarium.backbones.tnt.pyramid import PyramidTNT

__all__ = ["TNT", "PyramidTNT", "from_timm"]
