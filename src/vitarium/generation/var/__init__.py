"""VAR: autoregression over resolutions (Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale
Prediction", 2024).

An image is encoded as K maps of codes of growing size (1 x 1 ... 16 x 16), each coding the residual of the coarser ones, and a
transformer predicts a whole map at once from the maps before it: 10 steps per image instead of 256.

    p(maps) = prod_k p(map_k | map_1 ... map_{k-1}, class)

The transformer's input at scale k is not the codes but the image as their sum, at that resolution.

Follows the authors' code (github FoundationVision/VAR), whose checkpoints load by name: the transformer's and the tokenizer's file are one
model here, `create_model("var_d16", checkpoint="var_d16.pth + vae_ch160v4096z32.pth")`. Its options for other models than the released
ones are here too: plain attention, codes by angle, a convolution phi for all scales or for each. Left out: usage statistics of codes,
dropout of the tokenizer, of tokens and of attention weights (0 in all of the authors' trainings), progressive training over the scales
(announced in their code, not supported by it), and their fused kernels, which are the same function.
Cost: quadratic in the L = 680 tokens of a 256-pixel image; sampling caches keys and values, so that each token is processed once.

    tokenizer.py     images <-> maps of codes
    transformer.py   maps of codes -> logits of the next map
    model.py         both together: `VAR.generate`, `VAR.edit`
    learner.py       training of either
"""

from vitarium.generation.var.learner import VARLearner, VARTokenizerLearner
from vitarium.generation.var.model import VAR
from vitarium.generation.var.tokenizer import VARTokenizer

__all__ = ["VAR", "VARLearner", "VARTokenizer", "VARTokenizerLearner"]
