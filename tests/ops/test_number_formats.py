"""Number formats and packing: codes and values agree."""

from __future__ import annotations

import pytest
import torch

from vitarium.errors import UsageError
from vitarium.ops.number_formats import Float, Integer, PowerOfTwo, parse_format
from vitarium.ops.packing import pack, packed_bytes, unpack

FORMATS = ["int2", "int3", "int4", "int7", "int8", "uint1", "uint4", "uint8", "e2m1", "e3m0", "e1m2", "e2m3", "e3m4", "e4m3", "ue2m2"]


@pytest.mark.parametrize("name", FORMATS)
def test_codes_give_back_the_nearest_value(name):
    format, step = parse_format(name), torch.tensor(0.37, dtype=torch.float64)
    assert str(format) == name
    x = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    codes, values = format.encode(x, step), format.quantize(x, step)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**format.bits
    assert torch.equal(format.decode(codes, step), values)
    assert torch.equal(format.quantize(values, step), values)
    every = format.decode(torch.arange(2**format.bits).to(torch.uint8), step)
    best = (x[:, None] - every).abs().min(1).values
    torch.testing.assert_close((x - values).abs(), best, rtol=0, atol=1e-12)


@pytest.mark.parametrize("signed", [True, False])
def test_zero_points_shift_the_grid(signed):
    format, step, zero = Integer(4, signed=signed), torch.tensor(0.5), torch.tensor(3.0)
    x = torch.linspace(-9, 9, 50)
    assert torch.equal(format.decode(format.encode(x, step, zero), step, zero), format.quantize(x, step, zero))
    assert format.quantize(torch.zeros(1), step, zero) == 0


@pytest.mark.parametrize(
    ("format", "largest", "start"),
    [
        (Float(2, 1), 6, [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        (Float(3, 0), 16, [0, 0.25, 0.5, 1, 2, 4, 8, 16]),
        (Float(1, 2), 1.75, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]),
        (Float(2, 3), 7.5, [0, 0.125]),
        (Float(3, 2), 28, [0, 0.0625]),
        (Float(3, 4), 31, [0]),
        (Float(4, 3), 480, [0]),
    ],
    ids=str,
)
def test_the_published_grids(format, largest, start):
    assert format.largest == largest
    assert format.grid()[: len(start)].tolist() == start


def test_ties_round_to_even():
    x = torch.tensor([0.25, 0.75, 1.25, 2.5, 3.5, 5.0, 5.1])
    assert Float(2, 1).quantize(x, torch.tensor(1.0)).tolist() == [0, 1, 1, 2, 4, 4, 6]
    assert Integer(4).quantize(torch.tensor([0.5, 1.5, 2.5, 99.0, -99.0]), torch.tensor(1.0)).tolist() == [0, 2, 2, 7, -8]


def test_powers_of_two():
    x = torch.tensor([1.0, 0.6, 0.25, 2.0**-16, 0.0])
    assert PowerOfTwo(4).quantize(x, torch.tensor(1.0)).tolist() == [1, 0.5, 0.25, 0, 0]
    half = PowerOfTwo(4, 2).quantize(torch.tensor([0.7]), torch.tensor(1.0))
    torch.testing.assert_close(half, torch.tensor([0.5**0.5]))


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_leaves_no_gaps_and_gives_everything_back(bits):
    for count in (1, 7, 8, 33, 64):
        codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
        packed = pack(codes, bits)
        assert len(packed) == packed_bytes(count, bits) < count * bits / 8 + bits
        assert torch.equal(unpack(packed, bits, count), codes)
    assert packed_bytes(64, bits) == 8 * bits


@pytest.mark.parametrize("name", ["int9", "int1", "float4", "e9m9", ""])
def test_unknown_formats_are_refused(name):
    with pytest.raises(UsageError):
        parse_format(name)
