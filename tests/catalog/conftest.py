"""Fixtures that register the toy family for one test."""

from collections.abc import Iterator

import pytest

from tests.catalog.toys import Toy
from vitarium.catalog import registry
from vitarium.catalog.registry import family, rename


@pytest.fixture
def toy() -> Iterator[type[Toy]]:
    """Registers toy_small, toy_wide, toy_deep and toy_fine for one test."""
    family(
        "toy",
        variants={
            "small": dict(embed_dim=8, image_size=16),
            "wide": dict(embed_dim=12, image_size=16),
            "deep": dict(embed_dim=8, depth=3, image_size=16),
            "fine": dict(embed_dim=12, grid=8, image_size=32),
        },
        official=rename((r"^conv_in\.", "stem."), (r"^layers\.", "blocks."), (r"^ape$", "pos_table"), (r"^index$", None)),
        dialects={"timm": rename((r"^head\.fc\.", "head."), (r"^patch\.", "stem."))},
        weights={
            "small": {"in1k": ("hf:someone/toy", "https://example.org/toy.pth"), "in22k": ("timm:vit_tiny_patch16_224.augreg_in21k",)}
        },
    )(Toy)
    yield Toy
    del registry._FAMILIES["toy"]
