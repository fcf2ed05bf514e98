"""Images to patches and back; hiding tokens and putting them back."""

from __future__ import annotations

import pytest
import torch

from vitarium.ops.masking import mask_by_noise, restore_tokens, take_tokens, visible_count
from vitarium.ops.patches import patchify, unpatchify


def test_patches_go_row_by_row_with_channels_fastest():
    image = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = patchify(image, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4].view(2, 2, 3), image[1, :, 2:4, 2:4].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, 2, (2, 3)), image)


def test_refuses_what_patches_do_not_fill():
    with pytest.raises(ValueError, match="patches of 4 pixels do not fill an image of 6x8"):
        patchify(torch.zeros(1, 3, 6, 8), 4)


def test_counts_of_visible_patches_are_the_authors():
    """Their float arithmetic rounds down: 19.6 -> 19, and 0.19999 x 256 -> 51."""
    assert [visible_count(196, 0.9), visible_count(196, 0.75), visible_count(256, 0.8), visible_count(196, 0.0)] == [19, 49, 51, 196]


def test_least_noise_stays_and_comes_back_to_its_place():
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.3], [0.2, 0.8, 0.4, 0.6]])
    mask = mask_by_noise(noise, 2)
    assert mask.kept.tolist() == [[1, 3], [0, 2]]
    assert mask.hidden.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    tokens = torch.arange(8.0).view(2, 4, 1) + 1
    visible = take_tokens(tokens, mask.kept)
    assert visible.squeeze(-1).tolist() == [[2, 4], [5, 7]]
    back = restore_tokens(visible, torch.full((1, 1, 1), -1.0), mask.restore)
    assert back.squeeze(-1).tolist() == [[-1, 2, -1, 4], [5, -1, 7, -1]]
