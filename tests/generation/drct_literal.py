"""Literal implementation of DRCT by rolling, partitioning and masking, the reference for tests and timings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.generation.drct import DRCT, DenseBlock
from vitarium.ops.windows import relative_position_index, window_partition, window_reverse


def literal(model: DRCT, image: Tensor) -> Tensor:
    """The output of `model` for an image whose sides divide by the window."""
    first = F.conv2d((image - model.mean) * model.img_range, model.conv_first.weight, model.conv_first.bias, padding=1)
    x = model.norm_first(first.permute(0, 2, 3, 1))
    mask = shift_mask(*x.shape[1:3], model.window_size).to(x)
    index = relative_position_index(model.window_size, model.window_size)
    for group in model.groups:
        parts = [x]
        for i, block in enumerate(group.blocks):
            y = swin_block(block, torch.cat(parts, -1), model.window_size, model.window_size // 2 if i % 2 else 0, mask, index)
            weight = block.adjust.weight[:, :, None, None]
            y = F.conv2d(y.permute(0, 3, 1, 2), weight, block.adjust.bias).permute(0, 2, 3, 1)
            parts.append(F.leaky_relu(y, 0.2) if i < 4 else y)
        x = x + 0.2 * parts[-1]
    x = model.conv_after_body(model.norm(x).permute(0, 3, 1, 2)) + first
    x = F.leaky_relu(model.conv_before_upsample(x), 0.01)
    return model.conv_last(model.upsample(x)) / model.img_range + model.mean


def swin_block(block: DenseBlock, x: Tensor, size: int, shift: int, mask: Tensor, index: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C)"""
    _, height, width, dim = x.shape
    heads, n = block.attn.num_heads, size * size
    y = F.layer_norm(x, (dim,), block.norm1.weight, block.norm1.bias)
    if shift:
        y = torch.roll(y, (-shift, -shift), (1, 2))
    windows = window_partition(y, size)
    qkv = F.linear(windows, block.attn.qkv.weight, block.attn.qkv.bias)
    q, k, v = qkv.view(-1, n, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    logits = (q * (dim // heads) ** -0.5) @ k.transpose(-2, -1)
    logits = logits + block.attn.position_bias.table[index.flatten()].view(n, n, heads).permute(2, 0, 1)[None]
    if shift:
        logits = (logits.view(-1, len(mask), heads, n, n) + mask[None, :, None]).view(-1, heads, n, n)
    windows = (logits.softmax(-1) @ v).transpose(1, 2).reshape(-1, n, dim)
    y = window_reverse(F.linear(windows, block.attn.proj.weight, block.attn.proj.bias), size, height, width)
    if shift:
        y = torch.roll(y, (shift, shift), (1, 2))
    x = x + y
    mlp = block.mlp
    y = F.gelu(F.linear(F.layer_norm(x, (dim,), block.norm2.weight, block.norm2.bias), mlp.fc1.weight, mlp.fc1.bias))
    return x + F.linear(y, mlp.fc2.weight, mlp.fc2.bias)


def shift_mask(height: int, width: int, size: int) -> Tensor:
    """(windows, n, n): -100 between tokens of different regions of a rolled map."""
    regions = torch.zeros(1, height, width, 1)
    cuts = (slice(0, -size), slice(-size, -(size // 2)), slice(-(size // 2), None))
    for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
        regions[:, rows, columns] = number
    windows = window_partition(regions, size).squeeze(-1)
    return nn.functional.threshold((windows[:, None] != windows[:, :, None]).float(), 0.5, 0) * -100.0
