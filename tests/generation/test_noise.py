"""Generated images depend on the seed and their number, not on their batch."""

from __future__ import annotations

import pytest
import torch

import vitarium
from vitarium.errors import UsageError
from vitarium.generation.making import make_images
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


def moved(name: str, **arguments):
    """Return a model whose zero-initialised output layers hide nothing."""
    torch.manual_seed(0)
    model = vitarium.create_model(name, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("name", "arguments", "options"), GENERATORS, ids=[f"{n}-{o.get('sampler', o)}" for n, _, o in GENERATORS])
def test_batches_of_one_and_of_four_give_equal_images(name, arguments, options):
    model = moved(name, **arguments)
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
    for seed in (-1, 2**64):  # 2^64 would be seed 0
        with pytest.raises(UsageError, match="0 or more"):
            ImageNoise(seed, torch.tensor([0]))


def test_no_two_pairs_of_seed_and_number_share_their_noise():
    """Neither consecutive seeds nor consecutive batches do: the second batch of four of seed 0 is not the first of seed 4."""
    drawn = torch.cat([ImageNoise(seed, torch.arange(12)).normal(8) for seed in (*range(12), 2**32, 2**63, 2**64 - 1)])
    assert len(drawn.unique(dim=0)) == len(drawn) == 15 * 12


@pytest.mark.parametrize("name", ["dit_pico", "sit_flow_pico", "repa_pico", "var_pico", "dcgan_pico"])
def test_the_next_batch_is_not_that_of_another_seed(name):
    model = moved(name, num_classes=3)
    options = {} if name in ("var_pico", "dcgan_pico") else {"steps": 2}
    labels = [0] * 8
    of_seed_0 = make_images(model, labels, seed=0, batch_size=4, **options)
    of_seed_4 = make_images(model, labels[:4], seed=4, batch_size=4, **options)
    images = torch.cat([of_seed_0, of_seed_4]).flatten(1)
    assert torch.pdist(images).min() > 1e-3


def test_one_number_an_image():
    model = vitarium.create_model("sit_flow_pico", **SMALL)
    with pytest.raises(UsageError, match="one number per image"):
        model.generate(torch.tensor([0, 1]), indices=torch.tensor([0]), steps=2)
