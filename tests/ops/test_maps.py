"""Maps and token sequences."""

from __future__ import annotations

import pytest
import torch

from vitarium.ops.maps import as_map, as_tokens


@pytest.mark.identity
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_tokens_are_the_cells_of_a_map_row_by_row(memory_format):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    tokens = as_tokens(x)
    assert torch.equal(tokens[:, 7], x[:, :, 1, 2])
    assert torch.equal(as_map(tokens, (4, 5)), x)


def test_a_channels_last_map_and_its_tokens_share_their_memory():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    tokens = as_tokens(x)
    assert tokens.data_ptr() == x.data_ptr()
    assert as_map(tokens, (4, 5)).is_contiguous(memory_format=torch.channels_last)
