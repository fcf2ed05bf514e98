"""Heads of ImageNet-22K (21,841 classes) for the 1,000 classes of ImageNet-1K, by the WordNet ids of the classes, which timm lists."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

CLASSES_22K, CLASSES_1K = 21841, 1000
BY_NAME = "imagenet-22k"
"""timm's name of the order in which nearly all heads of 21,841 classes are: that of the archive of fall 2011, sorted by WordNet id."""
TEDDY_AS_CHEMISE = 5564
"""Row that Swin's list gives to teddy bear, the only class of the 1,000 that the 21,841 lack: that of a garment called teddy, too."""


@cache
def rows_of_1k(order: str = BY_NAME) -> tuple[int | None, ...]:
    """Return for each class of ImageNet-1K its row in a head of 21,841 classes; None for teddy bear (n04399382), which has none.

    Args:
        order: timm's name of the order of the rows. "imagenet-21k-goog" gives the list of Swin's authors (map22kto1k.txt): it counts two
            classes that the 21,841 lack, so that its rows from 9,205 on are one or two places off.
    """
    from timm.data import ImageNetInfo

    row = {name: number for number, name in enumerate(ImageNetInfo(order).label_names())}
    rows = [row.get(name) for name in ImageNetInfo("imagenet-1k").label_names()]
    return tuple(rows if order == BY_NAME else (TEDDY_AS_CHEMISE if place is None else place for place in rows))


def head_of_1k(head: Tensor, order: str = BY_NAME) -> Tensor:
    """Return the 1,000 rows of ImageNet-1K of the weight or bias of a head of ImageNet-22K: (21841, ...) -> (1000, ...).

    The class without a row gets the mean of the others, as in the code of TinyViT's authors. For `order` see `rows_of_1k`.
    """
    rows = rows_of_1k(order)
    known = torch.tensor([place for place in rows if place is not None])
    chosen = head[known]
    missing = [number for number, place in enumerate(rows) if place is None]
    for number in missing:  # in ascending order
        mean = chosen.mean(0, keepdim=True) if chosen.is_floating_point() else chosen[:1]
        chosen = torch.cat([chosen[:number], mean, chosen[number:]])
    return chosen
