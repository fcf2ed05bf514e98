"""Packing of codes of 1 to 8 bits without gaps: n codes occupy n * bits / 8 bytes.

The shortest run of codes that fills whole bytes is packed at once (two codes of 4 bits: one byte; four of 6 bits: three bytes), the first
code in the lowest bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Return the number of bytes that `count` codes occupy."""
    codes, size = _run(bits)
    return -(-count // codes) * size


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes below 2^bits, any shape, into uint8 bytes (packed_bytes(count, bits),). Codes of 8 bits are returned unchanged."""
    codes = codes.reshape(-1)
    if bits == 8:
        return codes
    in_run, size = _run(bits)
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % in_run)).view(-1, in_run)
    wide = codes.to(_word(size))
    words = sum((wide[:, i] << (bits * i) for i in range(1, in_run)), wide[:, 0])
    return torch.stack([(words >> (8 * j)) & 255 for j in range(size)], dim=1).to(torch.uint8).reshape(-1)


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """Invert `pack`: bytes -> the first `count` codes, uint8 (count,)."""
    if bits == 8:
        return data
    in_run, size = _run(bits)
    columns = data.view(-1, size).to(_word(size)).unbind(1)
    words = sum((column << (8 * j) for j, column in enumerate(columns) if j), columns[0])
    codes = torch.stack([(words >> (bits * i)) & (2**bits - 1) for i in range(in_run)], dim=1)
    return codes.to(torch.uint8).reshape(-1)[:count]


def _run(bits: int) -> tuple[int, int]:
    """Return (codes, bytes) of the shortest run of codes that fills whole bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _word(size: int) -> torch.dtype:
    return torch.uint8 if size == 1 else torch.int32 if size <= 3 else torch.int64
