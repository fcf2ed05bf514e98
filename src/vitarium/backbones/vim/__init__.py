"""Vision Mamba (Vim): a plain backbone with bidirectional selective scans in place of attention (Zhu et al., "Vision Mamba", 2024).

The idea: the architecture of a ViT (patches, class token, learned positions, equal blocks) with *selective scans* in place of attention and
MLP: each channel carries a state of N values along the sequence, with input-dependent writing, reading and decay. A scan is causal, so each
block has two, one in each direction, and the class token is placed in the middle of the sequence.

    x <- x + W_out(mean over directions of y . SiLU(z))            with [u | z] = W_in RMSNorm(x)
    v = SiLU(causal depth-wise conv_4(u));  [dt | b | c] = W_x v;  delta = softplus(W_dt dt + bias)
    s_t = exp(delta_t A) s_{t-1} + delta_t b_t v_t;  y_t = <c_t, s_t> + D v_t

Follows the authors' code (github hustvl/Vim, its released "bimamba v2, middle class token, divide by 2" models); its checkpoints load by
name, those of its first release (rotary positions, class token first) too. Left out, since no released model uses them: dropout of
positions, biases of the mixer's linear layers and other ranks of the step sizes, class tokens at a random place, randomly flipped
sequences, logits of each token (`forward_features` returns the tokens). Their segmentation and detection backbones are other models: these
read the outputs of the mixers, without the stream, through transposed convolutions. Any image size: positions are resampled and incomplete
patches are padded with zeros (the authors' code refuses other sizes).
Cost: linear in tokens, in time and in memory.

Speed: the memory layout is (batch, tokens, channels) throughout; the backward direction runs its convolution and its scan from the end
instead of flipping tensors; the two directions share one gating, since a flip of y and z commutes with their product; the scan is a
compiled kernel.

Legend: B images, L tokens, C = embed_dim, E = 2 C inner channels, N states per channel, R rank of the step sizes.

Files: `mixer` (scans, mixer and block), `model` (sequence of tokens, names of the authors' files, variants, classifier).
"""

from vitarium.backbones.vim.mixer import VimMixer
from vitarium.backbones.vim.model import OFFICIAL, Vim, resize_positions

__all__ = ["OFFICIAL", "Vim", "VimMixer", "resize_positions"]
