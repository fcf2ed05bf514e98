"""Measures of faithfulness are exact on models with known evidence."""

from __future__ import annotations

import pytest
import torch

from tests.explanation.known import SIZE, Patch, evidence, images
from vitarium.errors import InputError, UsageError
from vitarium.explanation.faithfulness import (
    average_drop,
    blurred,
    deletion,
    filled_in,
    increase_in_confidence,
    insertion,
    largest,
    masked_probability,
    measure,
    pointing,
    probability,
    road,
)

TARGET = torch.tensor([1, 1])


def perfect() -> torch.Tensor:
    return evidence().float()


def chance() -> torch.Tensor:
    return torch.rand(2, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def test_formulas():
    before, after = torch.tensor([0.8, 0.5, 0.2]), torch.tensor([0.4, 0.5, 0.3])
    assert average_drop(before, after).tolist() == pytest.approx([50, 0, 0])
    assert increase_in_confidence(before, after).tolist() == [0, 0, 100]


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 1.0])
def test_exactly_the_share_is_kept_even_of_equal_pixels(share: float):
    for maps in (chance(), torch.ones(2, SIZE, SIZE), perfect()):
        assert largest(maps, share).sum((1, 2)).tolist() == [round(share * SIZE * SIZE)] * 2
    one = chance()[:1]
    kept = largest(one, share or 0.25)
    assert one[kept].min() >= one[~kept].max() if share < 1 else kept.all()


def test_a_map_of_ones_is_the_image_itself():
    model, image = Patch(), images()
    assert torch.equal(masked_probability(model, image, torch.ones(2, SIZE, SIZE), TARGET, 1.0), probability(model, image, TARGET))


def test_a_map_of_zeros_leaves_the_mean_colour():
    p = masked_probability(Patch(), images(), torch.zeros(2, SIZE, SIZE), TARGET, 1.0)
    torch.testing.assert_close(p, torch.full((2,), 1 / 3))


def test_a_perfect_map_loses_nothing_and_no_map_is_better():
    found, other = measure(Patch(), images(), perfect(), TARGET), measure(Patch(), images(), chance(), TARGET)
    for share in (100, 50, 15):
        assert found[f"average_drop_{share}"].abs().max() < 1e-4
    assert (found["insertion"] > other["insertion"]).all()
    assert (found["deletion"] < other["deletion"]).all()
    assert (found["road"] > other["road"] + 0.1).all()
    against = measure(Patch(), images(), 1 - perfect(), TARGET)
    assert (against["road"] < 0).all()
    torch.testing.assert_close(against["road"], -found["road"], rtol=0, atol=0.15)


def test_curves_of_a_constant_model_are_its_probability():
    model = Patch()
    torch.nn.init.zeros_(model.weight)
    for curve in (insertion, deletion):
        torch.testing.assert_close(curve(model, images(), chance(), TARGET), torch.full((2,), 1 / 3))
    assert road(model, images(), chance(), TARGET).abs().max() == 0


def test_holes_are_filled_exactly_where_colours_change_evenly():
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(9.0), indexing="ij")
    image = torch.stack((y, x, 2 * y - x + 3))[None].double()
    holes = torch.zeros(1, 12, 9, dtype=torch.bool)
    holes[:, 2:7, 3:7] = True
    filled = filled_in(image.masked_fill(holes[:, None], 99.0), holes)
    torch.testing.assert_close(filled, image, rtol=0, atol=1e-9)
    flat = torch.full((1, 3, 8, 8), 0.7, dtype=torch.float64)
    scattered = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.8
    torch.testing.assert_close(filled_in(flat.masked_fill(scattered[:, None], -5.0), scattered), flat, rtol=0, atol=1e-9)
    assert filled_in(flat, torch.ones(1, 8, 8, dtype=torch.bool)).eq(0).all()
    assert torch.equal(filled_in(flat, torch.zeros(1, 8, 8, dtype=torch.bool)), flat)


def test_blurring_keeps_the_mean_colour_and_takes_the_shapes():
    flat = torch.full((1, 3, 10, 14), 0.3)
    torch.testing.assert_close(blurred(flat), flat)
    assert blurred(images()).std() < 0.6 * images().std()
    assert blurred(torch.randn(1, 1, 2, 2)).isfinite().all()


def test_pointing():
    maps = torch.zeros(2, 4, 4)
    maps[0, 1, 2], maps[1, 3, 0] = 1, 1
    box = torch.zeros(2, 4, 4, dtype=torch.bool)
    box[:, 0:2, 1:3] = True
    assert pointing(maps, box).tolist() == [1, 0]


def test_wrong_maps_and_measures():
    with pytest.raises(InputError, match="needs maps"):
        measure(Patch(), images(), perfect()[:1])
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        measure(Patch(), images(), 2 * perfect())
    with pytest.raises(UsageError, match="unknown measure"):
        measure(Patch(), images(), perfect(), measures=["drop"])
