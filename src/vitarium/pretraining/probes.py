"""Probes of frozen features: nearest neighbours, logistic regression, and a linear head trained on images.

    probe(model, open_data("digits"))["knn"]["accuracy"]

The first two read every image once (`vitarium probe`); the third trains on augmented images, as MAE's linear probe does (the objectives
`linear_probe` and `multilabel_probe`, recipe thorax_mae_probe).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog import preprocessing_of
from vitarium.catalog.features import pooled_features
from vitarium.data import BadFiles, ImageData
from vitarium.data.loader import Loader
from vitarium.errors import DataError
from vitarium.nn.modes import evaluating
from vitarium.training.classification import ClassificationLearner
from vitarium.training.learners import learner
from vitarium.training.multilabel import MultilabelLearner

NEIGHBOURS = 20
TEMPERATURE = 0.07
CHUNK = 1024
"""Number of images whose similarities to all others are in memory at once."""


def features_of(model: nn.Module, images: Any, *, batch_size: int = 64, bad_files: BadFiles | None = None) -> tuple[Tensor, Tensor]:
    """Return pooled features (N, C) of every readable image, float32, and the targets (N, ...), both on the CPU.

    Raises:
        UsageError: the model returns no features besides its logits.
    """
    place = next(model.parameters())
    loader = Loader(images, preprocessing_of(model), batch_size=batch_size, bad_files=bad_files)
    rows: list[tuple[Tensor, Tensor]] = []
    with evaluating(model, inference=True):
        for batch in loader.epoch(0):
            if len(batch["index"]):
                pooled = pooled_features(model, batch["image"].to(place))
                rows.append((pooled.float().cpu(), batch["target"]))
    if not rows:
        raise DataError("no image of the data can be read")
    found, targets = (torch.cat(column) for column in zip(*rows, strict=True))
    return found.clone(), targets.clone()  # outside inference mode


def knn_votes(
    known: Tensor, answers: Tensor, asked: Tensor, *, neighbours: int = NEIGHBOURS, temperature: float | None = TEMPERATURE
) -> Tensor:
    """Return the weighted share of each class among the nearest known features, by cosine similarity.

    Args:
        known: features (N, C) with known labels.
        answers: these labels, 1 and 0, (N, K).
        asked: features (M, C) to classify.
        neighbours: number of votes; all N, if there are fewer.
        temperature: a vote weighs exp(similarity / temperature), as in DINO's evaluation; None: all have equal weight.

    Returns:
        (M, K); the shares of classes sum to 1.
    """
    known, asked = F.normalize(known, dim=1), F.normalize(asked, dim=1)
    votes = []
    for some in asked.split(CHUNK):
        similar, nearest = (some @ known.T).topk(min(neighbours, len(known)), 1)
        weights = torch.ones_like(similar) if temperature is None else ((similar - similar[:, :1]) / temperature).exp()
        weights = weights / weights.sum(1, keepdim=True)
        votes.append((weights[..., None] * answers.to(weights.dtype)[nearest]).sum(1))
    return torch.cat(votes)


def linear_scores(known: Tensor, targets: Tensor, asked: Tensor, *, strength: float = 1.0) -> Tensor:
    """Return probabilities (M, K) by logistic regression on standardised features.

    Args:
        known: features (N, C).
        targets: class numbers (N,), or 1 and 0 for each of K labels (N, K).
        asked: features (M, C) to classify.
        strength: of the regularisation, scikit-learn's 1 / C.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler().fit(known.numpy())
    x, asked_x = scale.transform(known.numpy()), scale.transform(asked.numpy())
    several = targets.ndim == 2
    columns = targets.T if several else targets[None]
    scores: list[Tensor] = []
    for column in columns:
        if len(column.unique()) < 2:  # a label of all images, or of none
            scores.append(torch.zeros(len(asked)))
            continue
        found = LogisticRegression(C=1 / strength, max_iter=1000).fit(x, column.numpy()).predict_proba(asked_x)
        scores.append(torch.from_numpy(found[:, 1] if several else found))
    return torch.stack(scores, 1) if several else scores[0]


def probe(
    model: nn.Module, data: ImageData, *, neighbours: int = NEIGHBOURS, temperature: float | None = TEMPERATURE, batch_size: int = 64
) -> dict[str, dict[str, float]]:
    """Run both quick probes on a model's frozen features, fitted on the training part and evaluated on the held-out one.

    Args:
        model: a backbone, a classifier or a masked autoencoder, on any device.
        data: with one class per image, or several labels (an unknown label then counts as absent).
        neighbours, temperature: see `knn_votes`.
        batch_size: images per forward pass.

    Returns:
        {"knn": ..., "linear": ...}, each {"accuracy", "top5"} for classes (top5 for six or more), else {"auroc", "mean_average_precision"}.

    Raises:
        UsageError: a model without features. DataError: no labels.
    """
    if not data.classes:
        raise DataError(f"{data.name} has no labels to probe with")
    known, targets = features_of(model, data.train, batch_size=batch_size, bad_files=BadFiles())
    asked, truth = features_of(model, data.val, batch_size=batch_size, bad_files=BadFiles())
    if targets.ndim == 2:
        targets, truth = targets.nan_to_num(), truth.nan_to_num()
    answers = targets if targets.ndim == 2 else F.one_hot(targets, len(data.classes))
    votes = knn_votes(known, answers, asked, neighbours=neighbours, temperature=temperature)
    return {"knn": _judge(votes, truth), "linear": _judge(linear_scores(known, targets, asked), truth)}


def _judge(scores: Tensor, truth: Tensor) -> dict[str, float]:
    """Return metrics of scores (M, K) against class numbers (M,) or labels (M, K)."""
    if truth.ndim == 2:
        from sklearn.metrics import average_precision_score, roc_auc_score

        judged = [i for i in range(truth.shape[1]) if len(truth[:, i].unique()) == 2]
        if not judged:
            raise DataError("no label has both positive and negative held-out images; use more images")
        pairs = [(truth[:, i].numpy(), scores[:, i].numpy()) for i in judged]
        mean = lambda score: float(sum(score(*pair) for pair in pairs) / len(pairs))
        return {"auroc": mean(roc_auc_score), "mean_average_precision": mean(average_precision_score)}
    found = {"accuracy": (scores.argmax(1) == truth).float().mean().item()}
    if scores.shape[1] > 5:
        found["top5"] = (scores.topk(5, 1).indices == truth[:, None]).any(1).float().mean().item()
    return found


class HeadOnly:
    """Mixin for learners: a model except its head is frozen and in eval mode.

    A norm without weights before the head (`probe_norm`) still updates its statistics.
    """

    model: Any

    def __init__(self, model: nn.Module, settings: Any = None, **options: Any):
        super().__init__(model, settings, **options)  # type: ignore[call-arg]
        model.requires_grad_(False)
        self.model.get_classifier().requires_grad_(True)

    def train(self, mode: bool = True) -> Any:
        """Set training mode, except for frozen modules."""
        super().train(mode)  # type: ignore[misc]
        self.model.eval()
        for part in (self.model.get_classifier(), getattr(self.model, "head_norm", None)):
            if part is not None:
                part.train(mode)
        return self


@learner("linear_probe", task="classify")
class LinearProbe(HeadOnly, ClassificationLearner):
    """Classification by a linear head on frozen features."""


@learner("multilabel_probe", task="multilabel")
class MultilabelProbe(HeadOnly, MultilabelLearner):
    """Several binary labels by a linear head on frozen features."""
