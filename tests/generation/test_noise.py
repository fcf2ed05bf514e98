"""Generated images depend on the seed and their number, not on their batch."""

from __future__ import annotations

import pytest
import torch

import vitarium
from vitarium.errors import UsageError
from vitarium.generation.noise import ImageNoise

SMALL = dict(num_classes=3, embed_dim=16, depth=1, num_heads=2)
GENERATORS = [
    ("dit_pico", SMALL, dict(steps=4, sampler="ddpm")),
    ("dit_pico", SMALL, dict(steps=4, sampler="ddim", eta=0.5)),
    ("dit_pico", SMALL, dict(steps=4, sampler="DDPMScheduler")),
    ("sit_flow_pico", SMALL, dict(steps=4)),
    ("sit_flow_pico", SMALL, dict(steps=4, sampler="sde")),
    ("sit_flow_pico", SMALL, dict(sampler="dopri5")),
    ("repa_pico", dict(num_classes=3), dict(steps=4, sampler="heun")),
    ("var_pico", dict(num_classes=3), {}),
    ("var_pico", dict(num_classes=3), dict(smooth=True)),
]


@pytest.mark.parametrize(("name", "arguments", "options"), GENERATORS, ids=[f"{n}-{o.get('sampler', o)}" for n, _, o in GENERATORS])
def test_batches_of_one_and_of_four_give_equal_images(name, arguments, options):
    torch.manual_seed(0)
    model = vitarium.create_model(name, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():  # zero-initialised output layers would hide everything
            parameter.add_(0.05 * torch.randn_like(parameter))
    labels = torch.tensor([0, 2, 1, 0])
    together = model.generate(labels, seed=3, **options)
    apart = [model.generate(labels[i : i + 1], seed=3, indices=torch.tensor([i]), **options) for i in range(4)]
    torch.testing.assert_close(torch.cat(apart), together, rtol=0, atol=1e-5)
    assert (together[0] - together[3]).abs().max() > 1e-3  # the same class, another number
    assert (model.generate(labels, seed=4, **options) - together).abs().max() > 1e-3


def test_streams_are_keyed_by_seed_and_number():
    noise = ImageNoise(5, torch.tensor([0, 7])).normal(2000)
    torch.testing.assert_close(noise[1], ImageNoise(5, torch.tensor([7])).normal(2000)[0], rtol=0, atol=0)
    assert (noise[0] != noise[1]).all()
    assert (ImageNoise(7, torch.tensor([5])).normal(2000) != noise[1]).all()  # not symmetric
    assert noise.dtype is torch.float32
    assert noise.mean().abs() < 0.05
    assert 0.95 < noise.std() < 1.05
    with pytest.raises(UsageError, match="0 or more"):
        ImageNoise(-1, torch.tensor([0]))


def test_one_number_an_image():
    model = vitarium.create_model("sit_flow_pico", **SMALL)
    with pytest.raises(UsageError, match="one number per image"):
        model.generate(torch.tensor([0, 1]), indices=torch.tensor([0]), steps=2)
