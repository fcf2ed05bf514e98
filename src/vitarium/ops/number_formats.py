"""Number formats of few bits: the value of each code, and the nearest code of a value. Pure functions of tensors.

    int4 = Integer(4)
    codes = int4.encode(weight, step)            # bit patterns, uint8, ready for ops.packing
    int4.decode(codes, step)                     # = int4.quantize(weight, step), the nearest value of the format

Values are multiplied by a step (a tensor that broadcasts), so every format is scale-equivariant. Rounding is half to even.

    Integer      step * (code - zero)            int2 to int8, uint2 to uint8; symmetric without a zero point, else asymmetric
    Float        step * (-1)^s 2^e (1 + m)       ExMy with subnormals; no code is spent on infinity or NaN
    PowerOfTwo   step * 2^(-code / per_octave)   log2 and log-sqrt2 grids for values of one sign
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vitarium.errors import UsageError


class Format(Protocol):
    """A grid of numbers. `str(format)` is its name, and `parse_format` parses the name."""

    @property
    def bits(self) -> int:
        """Number of bits of one code."""

    def quantize(self, x: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        """Round to the nearest value of the grid, in x's shape and dtype."""

    def encode(self, x: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        """Return the bit pattern of the nearest value, uint8 in [0, 2^bits)."""

    def decode(self, codes: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        """Return the values of bit patterns, in the step's dtype."""


def _whole(name: str, value: int, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UsageError(f"{name} must be a whole number from {least} to {most}, got {value!r}")


@dataclass(frozen=True)
class Integer:
    """Equally spaced numbers.

    Args:
        bits: 1 to 8 (2 to 8 if signed).
        signed: whether codes run from -2^(bits-1) to 2^(bits-1) - 1, in two's complement, or from 0 to 2^bits - 1.
    """

    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        _whole("bits", self.bits, 2 if self.signed else 1, 8)

    def __str__(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    @property
    def lowest(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def highest(self) -> int:
        """Largest code."""
        return self.lowest + 2**self.bits - 1

    def round(self, x: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        """Return codes as whole numbers in x's dtype: clamp(round(x / step) + zero)."""
        codes = (x / step).round()
        return (codes if zero is None else codes + zero).clamp(self.lowest, self.highest)

    def quantize(self, x: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        codes = self.round(x, step, zero)
        return (codes if zero is None else codes - zero) * step

    def encode(self, x: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        return (self.round(x, step, zero).to(torch.int16) & (2**self.bits - 1)).to(torch.uint8)

    def integers(self, codes: Tensor) -> Tensor:
        """Return bit patterns as whole numbers: int8 if signed, else uint8."""
        if not self.signed:
            return codes
        if self.bits == 8:
            return codes.view(torch.int8)
        return (codes << (8 - self.bits)).view(torch.int8) >> (8 - self.bits)  # the right shift extends the sign

    def decode(self, codes: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        values = self.integers(codes).to(step.dtype)
        return (values if zero is None else values - zero) * step


@dataclass(frozen=True)
class Float:
    """Floating point of a few bits: sign, `exponent` bits, `mantissa` bits, the lowest binade subnormal.

    Args:
        exponent: 1 to 6; the natural grid (step 1) has bias max(2^(exponent-1) - 1, 1): e2m1 is 0, .5, 1, 1.5, 2, 3, 4, 6.
        mantissa: 0 to 6.
        signed: whether one bit holds the sign.
    """

    exponent: int
    mantissa: int
    signed: bool = True

    def __post_init__(self) -> None:
        _whole("exponent", self.exponent, 1, 6)
        _whole("mantissa", self.mantissa, 0, 6)
        if self.bits > 8:
            raise UsageError(f"a format has at most 8 bits, {self} has {self.bits}")

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}e{self.exponent}m{self.mantissa}"

    @property
    def bits(self) -> int:
        """Number of bits of one code."""
        return self.exponent + self.mantissa + self.signed

    @property
    def bias(self) -> int:
        """Bias of the exponent on the natural grid."""
        return max(2 ** (self.exponent - 1) - 1, 1)

    @property
    def largest(self) -> float:
        """Magnitude of the largest number at step 1; a tensor with absolute maximum c takes step c / largest."""
        return (2 - 2.0**-self.mantissa) * 2.0 ** (2**self.exponent - 1 - self.bias)

    def _binade(self, y: Tensor) -> Tensor:
        """Return the exponent field of each magnitude, at least 1 (subnormals share the spacing of the first binade)."""
        exponent = torch.frexp(y).exponent - 1 + self.bias
        return torch.where(y == 0, 1, exponent.clamp(min=1))  # frexp returns the exponent of 0.5 for 0

    def _nearest(self, y: Tensor) -> Tensor:
        y = y.clamp(-self.largest if self.signed else 0.0, self.largest)
        spacing = torch.ldexp(torch.ones_like(y), self._binade(y) - self.mantissa - self.bias)
        return (y / spacing).round() * spacing

    def quantize(self, x: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        return self._nearest(x / step) * step

    def encode(self, x: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        y = self._nearest(x / step)
        binade = self._binade(y)
        units = torch.ldexp(y.abs(), self.mantissa + self.bias - binade).to(torch.int16)
        codes = ((binade.to(torch.int16) - 1) << self.mantissa) + units
        return (codes + ((y < 0).to(torch.int16) << (self.bits - 1)) if self.signed else codes).to(torch.uint8)

    def grid(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the value of every code at step 1, (2^bits,)."""
        codes = torch.arange(2 ** (self.exponent + self.mantissa), device="cpu")
        binade = (codes >> self.mantissa).clamp(min=1)
        units = codes - ((binade - 1) << self.mantissa)
        values = torch.ldexp(units.to(dtype), binade - self.mantissa - self.bias)
        return torch.cat((values, -values)) if self.signed else values

    def decode(self, codes: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        return self.grid(step.dtype).to(step.device)[codes.long()] * step


@dataclass(frozen=True)
class PowerOfTwo:
    """Values of one sign on a grid of powers, step * 2^(-code / per_octave); values below the last code become 0.

    Zero has no code, as in the published log2 quantizers of attention weights; there is therefore no `encode`.

    Args:
        bits: 1 to 8.
        per_octave: 1 for log2, 2 for log-sqrt2.
    """

    bits: int
    per_octave: int = 1

    def __post_init__(self) -> None:
        _whole("bits", self.bits, 1, 8)
        _whole("per_octave", self.per_octave, 1, 8)

    def __str__(self) -> str:
        return f"pot{self.bits}" + (f"x{self.per_octave}" if self.per_octave > 1 else "")

    def quantize(self, x: Tensor, step: Tensor, zero: Tensor | None = None) -> Tensor:
        codes = (-self.per_octave * (x / step).log2()).round()
        return torch.where(codes < 2**self.bits, step * torch.exp2(-codes.clamp(min=0) / self.per_octave), 0.0)


def parse_format(name: str) -> Integer | Float | PowerOfTwo:
    """Return a format from its name: int4, uint8, e2m1, ue3m3, pot4, pot4x2.

    Raises:
        UsageError: unknown name.
    """
    if found := re.fullmatch(r"(u?)int(\d)", name):
        return Integer(int(found[2]), signed=not found[1])
    if found := re.fullmatch(r"(u?)e(\d)m(\d)", name):
        return Float(int(found[2]), int(found[3]), signed=not found[1])
    if found := re.fullmatch(r"pot(\d)(?:x(\d))?", name):
        return PowerOfTwo(int(found[1]), int(found[2] or 1))
    raise UsageError(f"unknown number format {name!r}; accepted are int2 to int8, uint1 to uint8, eXmY (e2m1, e4m3, ...) and potN")
