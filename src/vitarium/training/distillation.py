"""Distillation from stored logits: the teacher processes every augmented image once; students then train without it (TinyViT, 2022).

    store = save_logits(teacher, student, data, recipe, "answers", k=3)           # or objective.teacher: `vitarium train` makes it
    vitarium train distillation_pico --set objective.store=answers

The record of one image in one epoch has 4 + 4 K bytes: the seed of its augmentation (int32), and the K most probable classes (int16)
with their probabilities (float16). The loader seeds the generators of each sample from recipe seed, epoch and image index alone; the
record's seed is the first number drawn from them, and all augmentation is drawn from that seed. So the records of a student's batch are
found by (image, seed), for any order and any number of workers and processes, and student and teacher get the same pixels.

    target = stored probability for the K classes, (1 - their sum) / (classes - K) for each of the others;  loss = cross entropy with it

No true label is used, and no temperature. Mixing of images is not supported: its pairs depend on batches, which a store does not record.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog.create import create_model, preprocessing_of
from vitarium.catalog.saving import load
from vitarium.data.bad_files import BadFiles
from vitarium.data.image_set import size_of
from vitarium.data.loader import Loader, seed_generators, stack
from vitarium.errors import DataError, UsageError
from vitarium.files import atomic_path, is_model_file, lock_folder, write_json
from vitarium.nn.modes import evaluating
from vitarium.training.base import Batch, Learner
from vitarium.training.building import build_model
from vitarium.training.classification import ClassificationLearner
from vitarium.training.identity import earlier_fingerprint, fingerprint
from vitarium.training.learners import learner
from vitarium.training.settings import Section

if TYPE_CHECKING:
    from vitarium.catalog import Preprocessing
    from vitarium.data import ImageData
    from vitarium.data.transforms import Augment
    from vitarium.training.recipe import Recipe

HEADER = "store.json"
MOST_CLASSES = 2**15
"""Class numbers are stored as int16."""
Values = Literal["float16", "float32"]


class Replayed:
    """An augmentation that can be repeated: (image, target) -> (tensor, (target, seed))."""

    joint = True

    def __init__(self, augmentation: Callable[[Any], Tensor]):
        self.augmentation = augmentation

    def __call__(self, image: Any, target: Any) -> tuple[Tensor, tuple[Any, int]]:
        seed = random.getrandbits(31)
        return self.again(image, seed), (target, seed)

    def again(self, image: Any, seed: int) -> Tensor:
        """Augment an image by a seed. Sets the global generators."""
        seed_generators(seed)
        return self.augmentation(image)


def replayed_batch(samples: list[tuple[Tensor, Any]]) -> Batch:
    """Collate as `stack`, with "seed" (B,) where the samples are of `Replayed`."""
    if not samples or not isinstance(samples[0][1], tuple):
        return stack(samples)
    seeds = torch.tensor([seed for _, (_, seed) in samples], dtype=torch.int64)
    return {**stack([(image, target) for image, (target, _) in samples]), "seed": seeds}


class LogitStore:
    """A folder of a teacher's probabilities: store.json, and an array of records for each epoch. A copy or pickle opens the folder again.

    Attributes:
        header: teacher, classes, k, `pictures` (number of images), epochs, values, and the result of `conditions`.

    Raises:
        DataError: the folder holds no store, or a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.header: dict[str, Any] = json.loads((self.folder / HEADER).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder} holds no stored answers ({error}); make them with save_logits or objective.teacher") from error
        self._epochs: dict[int, Any] = {}
        self._latest = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": {}}  # a pickled memory map would contain the whole array

    @property
    def bytes_per_record(self) -> int:
        """Bytes of one image in one epoch."""
        return record_type(self.header["k"], self.header["values"]).itemsize

    def records(self, epoch: int) -> np.ndarray:
        """Return the records of all images: a memory-mapped structured array with the fields seed, classes (K,) and values (K,)."""
        if epoch not in self._epochs:
            path = self.folder / f"epoch-{epoch:04d}.npy"
            try:
                found = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise DataError(f"{path} cannot be read ({error}); make the store again") from error
            expected = record_type(self.header["k"], self.header["values"]), (self.header["pictures"],)
            if (found.dtype, found.shape) != expected:
                raise DataError(f"{path} holds other records than {HEADER} says; make the store again")
            self._epochs[epoch] = found
        return self._epochs[epoch]

    def find(self, index: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the answers about images (B,) augmented by seeds (B,): classes int64 and probabilities float32, (B, K) each.

        Raises:
            UsageError: no epoch holds them.
        """
        rows, seeds, count = index.cpu().numpy(), seed.cpu().numpy(), self.header["epochs"]
        if len(rows) == 0 or rows.max() < self.header["pictures"]:
            for epoch in ((self._latest + i) % count for i in range(count)):
                found = self.records(epoch)[rows]
                if (found["seed"] == seeds).all():
                    self._latest = epoch
                    return torch.from_numpy(found["classes"].astype(np.int64)), torch.from_numpy(found["values"].astype(np.float32))
        raise UsageError(
            f"none of the {count} epochs in {self.folder} holds these images with the present augmentation: train at most {count} epochs, "
            "with the data, seed and augmentation that the answers were stored with"
        )

    def targets(self, index: Tensor, seed: Tensor) -> Tensor:
        """Return the target of each image of `find`: (B, classes), each row with sum 1."""
        return spread(*self.find(index, seed), self.header["classes"])


def record_type(k: int, values: Values) -> np.dtype:
    """Return the dtype of one image's record: 4 + 4 K bytes with float16."""
    return np.dtype([("seed", "<i4"), ("classes", "<i2", (k,)), ("values", np.dtype(values).newbyteorder("<"), (k,))])


def spread(classes: Tensor, values: Tensor, num_classes: int) -> Tensor:
    """Scatter the stored probabilities (B, K) to all classes (B, num_classes); the others share the rest equally."""
    others = num_classes - classes.shape[1]
    rest = (1 - values.sum(1, keepdim=True)).clamp(min=0) / max(1, others)
    return rest.expand(len(values), num_classes).scatter(1, classes, values)


def conditions(student: nn.Module, data: ImageData, recipe: Recipe) -> dict[str, Any]:
    """Return the settings that determine the pixels in training, as plain values; they must be equal for a store and its students."""
    made = {
        "seed": recipe.seed,
        "augment": recipe.augment.model_dump(mode="json"),
        "preprocessing": asdict(preprocessing_of(student)),
        "data": fingerprint(data)["train"],
    }
    return json.loads(json.dumps(made))


def refuse_mixing(recipe: Recipe) -> None:
    """Raise UsageError if the recipe changes images in ways that a store does not record."""
    mixing = ClassificationLearner.Settings.model_validate(
        {key: value for key, value in recipe.objective.items() if key in ("loss", "mixing")}
    ).mixing
    if mixing.on or recipe.repeats > 1:
        raise UsageError("stored answers are about single images: set mixing.mixup=0, mixing.cutmix=0 and repeats=1")


def epochs_needed(data: ImageData, recipe: Recipe) -> int:
    """Return the number of epochs that a training in one process begins.

    Raises:
        UsageError: its budget is in minutes.
    """
    budget, per_epoch = recipe.budget, len(data.train) // recipe.batch_size // recipe.accumulate
    if budget.minutes is not None:
        raise UsageError("the number of epochs does not follow from a budget in minutes; give budget.steps or budget.epochs")
    return math.ceil(budget.epochs if budget.epochs is not None else (budget.steps or 0) / max(1, per_epoch))


def save_logits(
    teacher: nn.Module,
    student: nn.Module,
    data: ImageData,
    recipe: Recipe,
    folder: str | Path,
    *,
    k: int = 100,
    epochs: int | None = None,
    values: Values = "float16",
) -> LogitStore:
    """Store a teacher's predictions for the training images with a student's augmentation. A repeated call resumes an interrupted one.

    Args:
        teacher: image -> logits; it gets the student's augmented images at the student's size, in its own normalisation.
        student: only its preprocessing is used.
        recipe: of the student; its seed and augmentation are used.
        folder: of the store.
        k: most probable classes to keep, at most all.
        epochs: number of epochs to store; None: as many as the recipe's budget takes.
        values: type of the stored probabilities.

    Raises:
        UsageError: other classes than the data's, more than 32768 of them, a recipe that mixes images, or a folder with another store.
    """
    refuse_mixing(recipe)
    classes = int(getattr(teacher, "num_classes", 0))
    if classes != len(data.classes) or classes > MOST_CLASSES:
        raise UsageError(f"the teacher has {classes} classes, the data has {len(data.classes)} (at most {MOST_CLASSES} can be stored)")
    header = {
        "teacher": getattr(getattr(teacher, "spec", None), "name", type(teacher).__name__),
        "classes": classes,
        "k": min(k, classes),
        "pictures": len(data.train),
        "epochs": epochs if epochs is not None else epochs_needed(data, recipe),
        "values": values,
        **conditions(student, data, recipe),
    }
    folder = Path(folder)
    with lock_folder(folder):
        _check_same(folder, header)
        bad_files = BadFiles(total=size_of(data))
        for epoch in range(header["epochs"]):
            if (path := folder / f"epoch-{epoch:04d}.npy").exists():
                continue
            records = np.zeros(len(data.train), record_type(header["k"], values))
            for batch, answers in _answers(teacher, student, data, recipe, epoch, bad_files):
                some = records[rows := batch["index"].numpy()]
                found, classes_found = answers.topk(header["k"], 1)
                some["seed"], some["classes"], some["values"] = batch["seed"].numpy(), classes_found.numpy(), found.numpy()
                records[rows] = some
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                np.save(file, records)
        write_json(folder / HEADER, header)
    return LogitStore(folder)


def _check_same(folder: Path, header: dict[str, Any]) -> None:
    """Raise UsageError if the folder's records were stored under other conditions. The number of epochs may differ."""
    path = folder / "conditions.json"
    fixed = {name: value for name, value in header.items() if name != "epochs"}
    if not path.exists():
        write_json(path, fixed)
        return
    other = json.loads(path.read_text(encoding="utf-8"))
    if differ := sorted(name for name in fixed if other.get(name) != fixed[name]):
        raise UsageError(f"{folder} holds answers stored with another {', '.join(differ)}; use an empty folder")


def _answers(
    teacher: nn.Module, student: nn.Module, data: ImageData, recipe: Recipe, epoch: int, bad_files: BadFiles
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield the batches of an epoch, with the teacher's probabilities (B, classes), float32 on the CPU."""
    loader = Loader(
        data.train,
        Replayed(Learner(student).transform(recipe.augment)),
        batch_size=recipe.batch_size,
        collate=replayed_batch,
        seed=recipe.seed,
        bad_files=bad_files,
    )
    place = next(teacher.parameters())
    own, given = preprocessing_of(teacher), preprocessing_of(student)
    with evaluating(teacher, inference=True):
        for batch in loader.epoch(epoch):
            if len(batch["index"]):
                image = renormalised(batch["image"], given, own)
                yield batch, teacher(image.to(place)).float().softmax(1).cpu()


def renormalised(image: Tensor, given: Preprocessing, wanted: Preprocessing) -> Tensor:
    """Convert normalised images from one mean and standard deviation to another."""
    if (given.mean, given.std) == (wanted.mean, wanted.std):
        return image
    mean, std, new_mean, new_std = (torch.tensor(v)[:, None, None] for v in (given.mean, given.std, wanted.mean, wanted.std))
    return (image * std + mean - new_mean) / new_std


def check_store(
    store: LogitStore, teacher: nn.Module, student: nn.Module, data: ImageData, recipe: Recipe, *, batches: int = 4
) -> dict[str, float]:
    """Run the teacher again on the first images; return the mean absolute error of the values and the share of differing classes."""
    errors: list[Tensor] = []
    others: list[Tensor] = []
    asked = _answers(teacher, student, data, recipe, 0, BadFiles(total=size_of(data)))
    for (batch, answers), _ in zip(asked, range(batches), strict=False):
        classes, values = store.find(batch["index"], batch["seed"])
        errors.append((answers.gather(1, classes) - values).abs().flatten())
        likeliest = answers.topk(classes.shape[1], 1).indices
        others.append((classes[:, :, None] != likeliest[:, None]).all(2).float().flatten())
    return {"value_error": float(torch.cat(errors).mean()), "class_mismatch": float(torch.cat(others).mean())}


@learner("distillation", task="classify")
class DistillationLearner(ClassificationLearner):
    """Classification trained on a teacher's stored answers.

    Raises:
        UsageError: at training, without a store or with one that was made under other conditions.
    """

    class Settings(Section):
        """Settings of distillation.

        Args:
            store: folder of a `LogitStore`.
            teacher: a saved model, or the name of a pretrained one, which makes the store if it does not exist (in one process).
            k: most probable classes to keep when the store is made.
        """

        store: str | None = None
        teacher: str | None = None
        k: Annotated[int, Field(ge=1)] = 100

    settings: Settings

    def __init__(self, model: nn.Module, settings: Any = None, **options: Any):
        super().__init__(model, settings, **options)
        self._store: LogitStore | None = None

    @classmethod
    def create(
        cls, name: str | nn.Module, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None
    ) -> DistillationLearner:
        made = cls(build_model(name, data, recipe, pretrained=pretrained, checkpoint=checkpoint), recipe.settings_of(cls))
        made.prepare(data, recipe)
        return made

    def prepare(self, data: ImageData, recipe: Recipe) -> None:
        """Make the store if there is none and a teacher is given, and check that this recipe produces the same pixels."""
        refuse_mixing(recipe)
        if self.settings.teacher is not None and self.settings.store is not None and not (Path(self.settings.store) / HEADER).exists():
            teacher = open_teacher(self.settings.teacher)
            save_logits(teacher, self.model, data, recipe, self.settings.store, k=self.settings.k)
        header = self.store.header
        now = {"classes": len(data.classes), **conditions(self.model, data, recipe)}
        if "first" not in header["data"]:  # stored by version 0.1.0
            now["data"] = earlier_fingerprint(data)["train"]
        if differ := [name for name, value in now.items() if header[name] != value]:
            raise UsageError(f"the answers in {self.settings.store} were stored with another {', '.join(differ)} than this training has")

    @property
    def store(self) -> LogitStore:
        """The store of the teacher's predictions."""
        if self._store is None:
            if self.settings.store is None:
                raise UsageError("distillation learns from stored answers: set objective.store to their folder (see save_logits)")
            self._store = LogitStore(self.settings.store)
        return self._store

    def transform(self, augment: Augment | None) -> Callable[..., Any]:
        plain = super().transform(augment)
        return plain if augment is None else Replayed(plain)

    @staticmethod
    def collate(samples: list[tuple[Tensor, Any]]) -> Batch:
        return replayed_batch(samples)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Uses "index" and "seed" of the batch; "target" is ignored."""
        logits = self.model(batch["image"])
        return {"loss": F.cross_entropy(logits, self.store.targets(batch["index"], batch["seed"]).to(logits))}


def open_teacher(source: str) -> nn.Module:
    """Open a saved model (a path), or a pretrained one by name."""
    return load(source) if is_model_file(source) else create_model(source, pretrained=True)
