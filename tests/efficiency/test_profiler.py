"""The profiler counts the operations that run, checked against manual counts, and does not change the model."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from vitarium.efficiency.profiler import count_macs, count_params, example_image, peak_memory, profile, weight_bytes
from vitarium.errors import UsageError


class Wide(nn.Module):
    """A linear layer to many channels and back: its activations outweigh its weights at a large batch."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(48, 512, bias=False)
        self.back = nn.Linear(512, 8, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.back(self.wide(image.flatten(1)).relu())


class Attention(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        tokens = image.flatten(2)[:, :, :, None].permute(0, 1, 2, 3).expand(-1, -1, -1, 4)  # (B, 3 heads, N, 4)
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


def test_macs_of_linear_layers_are_their_products():
    assert count_macs(Wide(), 4) == 48 * 512 + 512 * 8


def test_fused_attention_is_counted():
    tokens = 8 * 8
    assert count_macs(Attention(), 8) == 2 * 3 * tokens * tokens * 4  # q k^T and its product with v


class Token(nn.Module):
    """Hands a view of a parameter to a part, as models with a class token do."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 48))
        self.layer = nn.Linear(48, 8, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(image.flatten(1)) + self.layer(self.token.expand(len(image), -1)) + self.layer(self.token)


def test_parts_that_are_handed_parameters_are_counted():
    assert count_macs(Token(), 4) == 3 * 48 * 8


def test_meta_and_real_models_cost_the_same():
    with torch.device("meta"):
        ghost = vitarium.create_model("timm/vit_pico")
    model = vitarium.create_model("timm/vit_pico")
    assert count_macs(ghost, 16) == count_macs(model, 16) > 1e6
    assert peak_memory(ghost, example_image(ghost, 16)) == peak_memory(model, example_image(model, 16))


def test_peak_memory_is_weights_image_and_the_two_widest_neighbours():
    model, image = Wide(), torch.randn(1000, 3, 4, 4)
    hidden = 1000 * 512 * 4  # bytes; before and after the relu
    assert peak_memory(model, image) == weight_bytes(model) + image.nbytes + 2 * hidden


def test_memory_that_is_freed_is_not_counted():
    deep = nn.Sequential(nn.Flatten(), *(nn.Linear(48, 48, bias=False) for _ in range(6)))
    image = torch.randn(1000, 3, 4, 4)
    assert peak_memory(deep, image) == weight_bytes(deep) + 3 * image.nbytes  # the image and one layer's input and output


def test_a_shared_parameter_counts_once():
    layer = nn.Linear(4, 4)
    assert count_params(nn.Sequential(layer, layer)) == 20


def test_profile_measures_all_and_leaves_the_model_as_it_was():
    model = vitarium.create_model("timm/resnet_pico").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cost = profile(model, 16, batch=4, runs=2)
    assert cost.params == count_params(model)
    assert cost.bytes == weight_bytes(model)
    assert min(cost.to_dict().values()) > 0
    assert cost.peak_memory_mb * 1e6 > cost.bytes
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # batch norm's statistics too
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_images_have_the_model_s_channels_and_dtype():
    model = vitarium.create_model("timm/resnet_pico", in_chans=1).double()
    image = example_image(model, (8, 12), batch=2)
    assert image.shape == (2, 1, 8, 12)
    assert image.dtype == torch.float64


@pytest.mark.parametrize("wrong", [dict(batch=0), dict(runs=0)])
def test_refuses_counts_below_one(wrong):
    with pytest.raises(UsageError, match="at least 1"):
        profile(Wide(), 4, **wrong)


def test_refuses_to_time_a_model_without_weights():
    with pytest.raises(UsageError, match="meta device"):
        profile(Wide().to("meta"), 4)


def test_the_first_count_in_a_process_knows_the_scan():
    """The scan registers its formula at first use, and a counter copies the formulas when it is made."""
    code = (
        "import vitarium; from vitarium.efficiency.profiler import count_macs\n"
        "model = vitarium.create_model('vim_pico'); print(count_macs(model), count_macs(model))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert first == second == 1_362_720
