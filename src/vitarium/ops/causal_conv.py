"""A causal depth-wise convolution along tokens, without leaving the tokens' own layout."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """y_t = bias + sum_k weight_{K-1-k} x_{t-k}, channel by channel, with zeros before the first token.

    Args:
        x: (I, L, D): images, tokens, channels.
        weight: (D, K), as the weight of torch's grouped convolution without its middle axis; the last column weighs the token itself.
        bias: (D,).
        reverse: whether later tokens take the place of earlier ones: the same as flipping the tokens of x, and those of y back.

    A few multiply-adds of shifted copies are more than twice as fast on a CPU as a grouped convolution, which wants channels first.
    """
    length, taps = x.shape[1], weight.T
    count = len(taps)
    padded = F.pad(x, (0, 0, 0, count - 1) if reverse else (0, 0, count - 1, 0))
    if reverse:
        taps = taps.flip(0)
    y = padded[:, :length] * taps[0] if bias is None else bias.addcmul(padded[:, :length], taps[0])
    for k in range(1, count):
        y = y.addcmul(padded[:, k : k + length], taps[k])
    return y
