"""Values cached in evaluation mode must be invalidated when their weights change."""

import copy

import torch
from torch import nn

import vitarium
from vitarium.nn import EvalCache


class Doubled(nn.Module):
    """Module that derives twice its weight and counts the computations."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.cache = EvalCache()
        self.built = 0

    def forward(self):
        return self.cache.get(self, "twice", self.weight, self.build)

    def build(self):
        self.built += 1
        return 2 * self.weight


@torch.no_grad()
def test_kept_until_the_weight_changes():
    module = Doubled().eval()
    assert module() is module()
    assert module.built == 1
    module.weight.mul_(2)
    assert module().tolist() == [4, 4, 4]
    module.load_state_dict({"weight": torch.zeros(3)})
    assert module().tolist() == [0, 0, 0]
    assert module.double()().dtype == torch.float64


@torch.no_grad()
def test_a_copy_starts_empty_and_nothing_is_saved():
    module = Doubled().eval()
    module()
    twin = copy.deepcopy(module)
    twin()
    assert twin.built == 2
    assert list(module.state_dict()) == ["weight"]


def test_a_fused_step_is_seen():
    """A fused optimizer changes weights without a version bump; train() and eval() invalidate the cache."""
    model = vitarium.create_model("convit_pico", num_classes=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    image = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))  # another size than the tables'
    with torch.no_grad():
        model.eval()(image)
    model.train()(image[:, :, :16, :16]).sum().backward()
    optimizer.step()
    with torch.no_grad():
        kept = model.eval()(image)
        fresh = copy.deepcopy(model)(image)
    torch.testing.assert_close(kept, fresh, rtol=0, atol=0)
