"""Deformable attention: equality with the authors' code and transformers, and the case without offsets."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests import golden
from vitarium.nn.deformable import DeformableAttention
from vitarium.ops.deformable import deformable_attention

SHAPES = [(8, 10), (4, 5), (2, 3)]


def test_equals_the_authors():
    name = "dense_base-msdeform_attn"
    doc = golden.read_golden(name)
    module = DeformableAttention(64, 3, 4, 2).double().eval()
    module.load_state_dict(golden.fill_state(doc["state"]))
    assert sum(p.numel() for p in module.parameters()) == doc["parameters"]
    x = {key: golden.make_input(key, spec) for key, spec in doc["inputs"].items()}
    padding = x["pad"] == 0
    with torch.no_grad():
        outputs = {
            "ref2": module(x["query"], x["ref2"], x["value"], SHAPES, padding),
            "ref4": module(x["query"], x["ref4"], x["value"], SHAPES, padding),
            "nomask": module(x["query"], x["ref2"], x["value"], SHAPES),
        }
    assert golden.compare(name, outputs) < 1e-12


def test_equals_transformers():
    modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    from transformers import DeformableDetrConfig

    config = DeformableDetrConfig(d_model=32, use_timm_backbone=False, backbone_config=None, num_feature_levels=2)
    theirs = modeling.DeformableDetrMultiscaleDeformableAttention(config, num_heads=4, n_points=3).double().eval()
    ours = DeformableAttention(32, 2, 4, 3).double().eval()
    ours.load_state_dict(theirs.state_dict())
    shapes = [(6, 4), (3, 2)]
    query, value = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 30, 32, dtype=torch.float64)
    reference, padding = torch.rand(2, 5, 2, 2, dtype=torch.float64), torch.rand(2, 30) < 0.2
    with torch.no_grad():
        expected = theirs(
            query,
            ~padding,
            encoder_hidden_states=value,
            reference_points=reference,
            spatial_shapes=torch.tensor(shapes),
            spatial_shapes_list=shapes,
            level_start_index=torch.tensor([0, 24]),
        )[0]
        torch.testing.assert_close(ours(query, reference, value, shapes, padding), expected, rtol=0, atol=1e-12)


def test_one_place_is_a_bilinear_sample_at_the_reference():
    value = torch.randn(1, 12, 1, 5, dtype=torch.float64)
    place = torch.rand(1, 7, 1, 1, 1, 2, dtype=torch.float64)
    found = deformable_attention(value, [(3, 4)], place, torch.ones(1, 7, 1, 1, 1, dtype=torch.float64))
    maps = value[:, :, 0].transpose(1, 2).unflatten(-1, (3, 4))
    expected = F.grid_sample(maps, 2 * place[:, :, 0, 0] - 1, align_corners=False)[..., 0].transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_gradients_are_those_of_finite_differences():
    value = torch.randn(1, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    places = (torch.rand(1, 2, 2, 1, 2, 2, dtype=torch.float64) * 0.5 + 0.25).requires_grad_()
    weights = torch.rand(1, 2, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, p, w: deformable_attention(v, [(2, 3)], p, w), (value, places, weights))


def test_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="have 4 cells, value has 6"):
        deformable_attention(torch.zeros(1, 6, 1, 2), [(2, 2)], torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1))
