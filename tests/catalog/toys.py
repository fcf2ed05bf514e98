"""A toy family with the difficult cases of checkpoint loading: position table, dialect, variants of similar shapes."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.nn import Backbone, Stage


class Toy(Backbone):
    """(B, in_chans, H, W) -> logits."""

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int = 1,
        grid: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
    ):
        super().__init__(stages=[Stage(embed_dim, 4)], num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate)
        self.stem = nn.Conv2d(in_chans, embed_dim, 4, 4)
        self.pos_table = nn.Parameter(0.1 * torch.randn(1, embed_dim, grid, grid))
        self.blocks = nn.ModuleList(nn.Conv2d(embed_dim, embed_dim, 1) for _ in range(depth))
        self.act = act_layer()
        self.norm = nn.BatchNorm2d(embed_dim)

    def forward_stages(self, image: Tensor) -> Iterator[Tensor]:
        x = self.stem(image)
        x = x + F.interpolate(self.pos_table, size=x.shape[-2:])
        for block in self.blocks:
            x = x + self.act(block(x))
        yield x

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        if name != "pos_table" or tensor.shape[:2] != shape[:2]:
            return None
        return F.interpolate(tensor, size=shape[2:], mode="bicubic")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that a model holds."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Bit for bit."""
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)


def officially_named(model: nn.Module) -> dict[str, Tensor]:
    """A toy's state as its imaginary authors would have written it."""
    names = {"stem.": "conv_in.", "blocks.": "layers.", "pos_table": "ape"}
    state = {}
    for name, tensor in model.state_dict().items():
        new = next((name.replace(ours, theirs, 1) for ours, theirs in names.items() if name.startswith(ours)), name)
        state[new] = tensor.clone()
    return {**state, "index": torch.arange(4)}
