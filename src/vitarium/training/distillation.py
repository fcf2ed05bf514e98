"""Distillation from stored answers: the teacher looks at every augmented picture once; students then learn without it (TinyViT, 2022).

    store = save_logits(teacher, student, data, recipe, "answers", k=3)           # or `objective.teacher`: `vitarium train` makes it
    vitarium train distillation_pico --set objective.store=answers

What is stored of one picture in one epoch is a record of 4 + 4 K bytes: the seed of its augmentation (int32), and the K likeliest classes
(int16) with their probabilities (float16). The loader of the house gives every sample's generators a state that depends on recipe seed,
epoch and picture alone; the record's seed is the first number drawn from them, and everything that augmentation draws comes from it. So
a student's batch finds its records by (picture, seed), whatever the order, the workers and the processes, and sees the teacher's pixels.

    target = stored probability for the K classes, (1 - their sum) / (classes - K) for each of the others;  loss = cross entropy with it

No true label is used, and no temperature. Mixing of pictures is refused: its pairs depend on batches, which a store does not know.
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
from vitarium.data.loader import Loader, seed_generators, stack
from vitarium.errors import DataError, UsageError
from vitarium.files import atomic_path, lock_folder, write_json
from vitarium.nn.modes import evaluating
from vitarium.training.base import Batch, Learner
from vitarium.training.building import build_model
from vitarium.training.checkpoint import fingerprint
from vitarium.training.classification import ClassificationLearner
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
    """An augmentation that can be done again: (picture, target) -> (tensor, (target, seed))."""

    joint = True

    def __init__(self, augmentation: Callable[[Any], Tensor]):
        self.augmentation = augmentation

    def __call__(self, picture: Any, target: Any) -> tuple[Tensor, tuple[Any, int]]:
        seed = random.getrandbits(31)
        return self.again(picture, seed), (target, seed)

    def again(self, picture: Any, seed: int) -> Tensor:
        """The picture as that seed augments it. Sets the global generators."""
        seed_generators(seed)
        return self.augmentation(picture)


def replayed_batch(samples: list[tuple[Tensor, Any]]) -> Batch:
    """As `stack`, with "seed" (B,) where the samples were replayed."""
    if not samples or not isinstance(samples[0][1], tuple):
        return stack(samples)
    seeds = torch.tensor([seed for _, (_, seed) in samples], dtype=torch.int64)
    return {**stack([(image, target) for image, (target, _) in samples]), "seed": seeds}


class LogitStore:
    """A folder of a teacher's answers: store.json, and an array of records for each epoch. A copy or a pickle of it opens it anew.

    Attributes:
        header: what it was made with: teacher, classes, k, pictures, epochs, values, and the conditions of `conditions`.

    Raises:
        DataError: no store there, or a damaged one.
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
        return {**self.__dict__, "_epochs": {}}  # pickled, a memory map would be its whole content

    @property
    def bytes_per_record(self) -> int:
        """Of one picture in one epoch."""
        return record_type(self.header["k"], self.header["values"]).itemsize

    def records(self, epoch: int) -> np.ndarray:
        """Those of all pictures, a structured array with the fields seed, classes (K,) and values (K,); read when they are looked at."""
        if epoch not in self._epochs:
            path = self.folder / f"epoch-{epoch:04d}.npy"
            try:
                found = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise DataError(f"{path} cannot be read ({error}); make the store anew") from error
            expected = record_type(self.header["k"], self.header["values"]), (self.header["pictures"],)
            if (found.dtype, found.shape) != expected:
                raise DataError(f"{path} holds other records than {HEADER} says; make the store anew")
            self._epochs[epoch] = found
        return self._epochs[epoch]

    def find(self, index: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        """The answers about pictures (B,) augmented by seeds (B,), of one epoch: classes int64 and probabilities float32, (B, K) each.

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
            f"none of the {count} epochs in {self.folder} holds these pictures as they were augmented now: train at most {count} epochs, "
            "with the data, seed and augmentation that the answers were stored with"
        )

    def targets(self, index: Tensor, seed: Tensor) -> Tensor:
        """Shares of all classes for `find`'s pictures: (B, classes), each row with sum 1."""
        return spread(*self.find(index, seed), self.header["classes"])


def record_type(k: int, values: Values) -> np.dtype:
    """One picture's answer in memory: 4 + 4 K bytes with float16."""
    return np.dtype([("seed", "<i4"), ("classes", "<i2", (k,)), ("values", np.dtype(values).newbyteorder("<"), (k,))])


def spread(classes: Tensor, values: Tensor, num_classes: int) -> Tensor:
    """Shares (B, num_classes) with the stored ones (B, K) in their places, and what they leave in equal parts on the others."""
    others = num_classes - classes.shape[1]
    rest = (1 - values.sum(1, keepdim=True)).clamp(min=0) / max(1, others)
    return rest.expand(len(values), num_classes).scatter(1, classes, values)


def conditions(student: nn.Module, data: ImageData, recipe: Recipe) -> dict[str, Any]:
    """What decides a training's pixels, as plain values: the same for a store and for who learns from it."""
    made = {
        "seed": recipe.seed,
        "augment": recipe.augment.model_dump(mode="json"),
        "preprocessing": asdict(preprocessing_of(student)),
        "data": fingerprint(data)["train"],
    }
    return json.loads(json.dumps(made))


def refuse_mixing(recipe: Recipe) -> None:
    """Raises UsageError for what changes pictures in ways that a store does not know."""
    mixing = ClassificationLearner.Settings.model_validate(
        {key: value for key, value in recipe.objective.items() if key in ("loss", "mixing")}
    ).mixing
    if mixing.on or recipe.repeats > 1:
        raise UsageError("stored answers are about single images: set mixing.mixup=0, mixing.cutmix=0 and repeats=1")


def epochs_needed(data: ImageData, recipe: Recipe) -> int:
    """Epochs that a training in one process begins.

    Raises:
        UsageError: its budget is in minutes.
    """
    budget, per_epoch = recipe.budget, len(data.train) // recipe.batch_size // recipe.accumulate
    if budget.minutes is not None:
        raise UsageError("how many epochs to store is not known from a budget in minutes; give budget.steps or budget.epochs")
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
    """Let a teacher look at the training pictures as a student will see them, and store its answers. Called again, it goes on.

    Args:
        teacher: image -> logits; it sees the student's pixels, at the student's size, in its own normalisation.
        student: for its preprocessing alone.
        recipe: the student's: seed and augmentation count.
        folder: of the store.
        k: likeliest classes to keep; at most all are.
        epochs: to store; None: as many as the recipe's budget takes.
        values: type of the stored probabilities.

    Raises:
        UsageError: other classes than the data's, more than 32768 of them, a recipe that mixes pictures, or a folder with another store.
    """
    refuse_mixing(recipe)
    classes = int(getattr(teacher, "num_classes", 0))
    if classes != len(data.classes) or classes > MOST_CLASSES:
        raise UsageError(
            f"the teacher tells {classes} classes apart, the data has {len(data.classes)} (at most {MOST_CLASSES} can be stored)"
        )
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
        bad_files = BadFiles()
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
    """Refuse a folder whose answers were stored under other conditions; more epochs are welcome."""
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
    """Batches of an epoch's pictures, each once, with the teacher's probabilities (B, classes), float32 on the CPU."""
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
                image = _renormalised(batch["image"], given, own)
                yield batch, teacher(image.to(place)).float().softmax(1).cpu()


def _renormalised(image: Tensor, given: Preprocessing, wanted: Preprocessing) -> Tensor:
    """From one normalisation into another."""
    if (given.mean, given.std) == (wanted.mean, wanted.std):
        return image
    mean, std, new_mean, new_std = (torch.tensor(v)[:, None, None] for v in (given.mean, given.std, wanted.mean, wanted.std))
    return (image * std + mean - new_mean) / new_std


def check_store(
    store: LogitStore, teacher: nn.Module, student: nn.Module, data: ImageData, recipe: Recipe, *, batches: int = 4
) -> dict[str, float]:
    """Ask the teacher again about the first pictures: mean |value error|, and the share of stored classes that are others now."""
    errors: list[Tensor] = []
    others: list[Tensor] = []
    asked = _answers(teacher, student, data, recipe, 0, BadFiles())
    for (batch, answers), _ in zip(asked, range(batches), strict=False):
        classes, values = store.find(batch["index"], batch["seed"])
        errors.append((answers.gather(1, classes) - values).abs().flatten())
        likeliest = answers.topk(classes.shape[1], 1).indices
        others.append((classes[:, :, None] != likeliest[:, None]).all(2).float().flatten())
    return {"value_error": float(torch.cat(errors).mean()), "class_mismatch": float(torch.cat(others).mean())}


@learner("distillation", task="classify")
class DistillationLearner(ClassificationLearner):
    """Image -> class, learned from a teacher's stored answers; evaluated as any classifier.

    Raises:
        UsageError: when it is to learn and has no store, or one that was made under other conditions.
    """

    class Settings(Section):
        """Where the answers are.

        Args:
            store: folder of a `LogitStore`.
            teacher: a saved model, or the name of a pretrained one: makes the store where it is not there yet (in one process).
            k: likeliest classes to keep when the store is made.
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
        """Make the store where there is none and a teacher is named, and check that a training by this recipe sees its pixels."""
        refuse_mixing(recipe)
        if self.settings.teacher is not None and self.settings.store is not None and not (Path(self.settings.store) / HEADER).exists():
            teacher = open_teacher(self.settings.teacher)
            save_logits(teacher, self.model, data, recipe, self.settings.store, k=self.settings.k)
        header = self.store.header
        now = {"classes": len(data.classes), **conditions(self.model, data, recipe)}
        if differ := [name for name, value in now.items() if header[name] != value]:
            raise UsageError(f"the answers in {self.settings.store} were stored with another {', '.join(differ)} than this training has")

    @property
    def store(self) -> LogitStore:
        """The teacher's answers."""
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
        """Needs "seed" of the batch; "target" is not looked at."""
        logits = self.model(batch["image"])
        return {"loss": F.cross_entropy(logits, self.store.targets(batch["index"], batch["seed"]).to(logits))}


def open_teacher(source: str) -> nn.Module:
    """A model saved by the house (a path), or a pretrained one by name."""
    return load(source) if Path(source).exists() else create_model(source, pretrained=True)
