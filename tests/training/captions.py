"""Scenes of several sizes with their captions, some of which are missing, and a learner that uses both; everything is picklable."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.tiny import tiny_recipe, weights
from vitarium.data import ImageData, Sample
from vitarium.data.fields import Collate, FieldTransform, lengths_of, listed, packed, padded, stacked
from vitarium.data.scenes import THINGS, Scenes
from vitarium.training import Learner, fit

SIZES, WORDS, PATCH = (16, 20, 24), 97, 4
RECIPE = ("mixing={}", "accumulate=1", "augment={}", "num_workers=0")

FIELDS = {
    "image": padded(3, None, None, multiple=PATCH),
    "text": packed(dtype=torch.int64, optional=True),
    "target": stacked(dtype=torch.int64),
    "name": listed(),
}


class CaptionedScenes:
    """Samples with image, target and name, and, but for every fifth, text."""

    def __init__(self, count: int, seed: int = 0):
        self.scenes = [Scenes(image_size=size, seed=seed, length=count) for size in SIZES]
        self.targets = [self.scenes[0].label(i) for i in range(count)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        scene = self.scenes[index % len(SIZES)][index]
        sample = Sample(image=scene.image, target=scene.label, name=self.describe(index))
        return sample if index % 5 == 0 else Sample(sample, text=scene.caption)

    def describe(self, index: int) -> str:
        return f"scenes/{index}"


def caption_data(train: int = 60, val: int = 17) -> ImageData:
    return ImageData("captions", CaptionedScenes(train), CaptionedScenes(val, seed=1), list(THINGS))  # type: ignore[arg-type]


def to_tensor(image: Any) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W), with a random brightness."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 - 0.5 + 0.1 * torch.rand(1)


def to_plain_tensor(image: Any) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 - 0.5


def to_words(text: str) -> Tensor:
    return torch.tensor([zlib.crc32(word.strip(".,").lower().encode()) % WORDS for word in text.split()])


class TwoTowers(nn.Module):
    """Images (B, 3, H, W) with a mask (B, H, W), and packed words with lengths (B,) -> logits (B, classes)."""

    def __init__(self, classes: int = len(THINGS)):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, PATCH, PATCH)
        self.words = nn.Embedding(WORDS, 16)
        self.absent = nn.Parameter(torch.zeros(16))
        self.head = nn.Linear(32, classes)

    def forward(self, image: Tensor, mask: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
        real = mask[:, ::PATCH, ::PATCH].flatten(1).to(image.dtype)[..., None]
        tokens = self.patches(image).relu().flatten(2).transpose(1, 2)
        seen = (tokens * real).sum(1) / real.sum(1)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=text.device), lengths)
        read = seen.new_zeros(len(lengths), 16).index_add(0, owner, self.words(text)) / lengths.clamp(min=1)[:, None]
        return self.head(torch.cat([seen, torch.where(lengths[:, None] > 0, read, self.absent)], 1))


class Captions(Learner):
    """Classification of the object in front, from the image and its caption."""

    collate = Collate(FIELDS)  # type: ignore[assignment]
    breaks_at = -1

    def before_step(self, step, total_steps):
        if step == self.breaks_at:
            raise RuntimeError(f"at step {step}")

    def transform(self, augment):
        return FieldTransform(image=to_plain_tensor if augment is None else to_tensor, text=to_words)

    def logits(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        assert torch.equal(batch["text_present"], lengths_of(batch, "text") > 0)
        return model(batch["image"], batch["image_mask"], batch["text"], lengths_of(batch, "text"))

    def loss(self, batch):
        return {"loss": F.cross_entropy(self.logits(self.model, batch), batch["target"])}

    def metrics(self):
        from torchmetrics import MeanMetric

        return nn.ModuleDict({"accuracy": MeanMetric()})

    def evaluate_batch(self, model, batch, metrics):
        metrics["accuracy"].update((self.logits(model, batch).argmax(1) == batch["target"]).float())

    def summary(self, metrics):
        return {"accuracy": metrics["accuracy"].compute().item()}


def train(folder: Path, *assignments: str, devices: int = 1, breaks_at: int = -1):
    """Train one; the result and its weights."""
    torch.manual_seed(0)
    recipe = tiny_recipe("objective={name: captions}", *RECIPE[1:], *assignments)
    learner = Captions(TwoTowers())
    learner.breaks_at = breaks_at
    result = fit(learner, caption_data(), recipe, folder, devices=devices, accelerator="cpu")
    return result, weights(learner.model)
