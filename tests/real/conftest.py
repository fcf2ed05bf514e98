"""Real weights and photographs, made once a session."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import vitarium
from tests.real.dinov2 import write_folder

SIZE = 56
"""Side of the images, pixels: 16 patches, so that the whole suite takes minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.real)
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DINOv2-S in transformers' layout."""
    return write_folder(tmp_path_factory.mktemp("real") / "dinov2")


@pytest.fixture(scope="session")
def dinov2(folder: Path) -> nn.Module:
    """DINOv2-S as timm's model, without a head; not to be changed."""
    return vitarium.create_model(
        "timm/vit_small_patch14_dinov2", checkpoint=str(folder / "model.safetensors"), num_classes=0, image_size=SIZE
    ).eval()


@pytest.fixture(scope="session")
def photographs() -> list[Path]:
    """foolbox's twenty ImageNet photographs."""
    spec = importlib.util.find_spec("foolbox")
    assert spec is not None, "foolbox is not installed; `make real` installs it"
    assert spec.submodule_search_locations
    found = sorted((Path(next(iter(spec.submodule_search_locations))) / "data").glob("imagenet_*.jpg"))
    assert len(found) == 20
    return found


@pytest.fixture(scope="session")
def fashion_features(dinov2: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Features and labels of 1,000 training and 500 test images of `fashion`."""
    return {part: features_of(dinov2, images) for part, images in fashion().items()}


def fashion() -> dict[str, vitarium.data.ImageSet]:  # type: ignore[name-defined]
    """Return 1,000 training and 500 test images."""
    data = vitarium.open_data("fashion:train=1000,test=500")
    return {"train": data.train, "test": data.val}


@torch.inference_mode()
def features_of(model: nn.Module, images: vitarium.data.ImageSet) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[name-defined]
    """Return the pooled features (N, 384) of a model, and the labels (N,)."""
    from vitarium.catalog import preprocessing_of

    prepare = preprocessing_of(model)
    batches = [torch.stack([prepare(images[i][0]) for i in range(k, min(k + 50, len(images)))]) for k in range(0, len(images), 50)]
    return torch.cat([model(batch) for batch in batches]), torch.tensor(images.targets)


def agreement(train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor], k: int = 10) -> float:
    """Return the accuracy of k nearest neighbours by cosine, 0 to 1."""
    left, right = (nn.functional.normalize(part[0], dim=1) for part in (train, test))
    nearest = train[1][(right @ left.T).topk(k, dim=1).indices]
    return (nearest.mode(1).values == test[1]).float().mean().item()
