"""Training of VAR: first the tokenizer on images alone, then the transformer on its codes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.errors import UsageError
from vitarium.generation.var.model import VAR
from vitarium.generation.var.tokenizer import VARTokenizer
from vitarium.training import Learner, learner
from vitarium.training.base import Batch
from vitarium.training.building import build_model
from vitarium.training.settings import Section

if TYPE_CHECKING:
    from vitarium.data import ImageData
    from vitarium.training.recipe import Recipe


@learner("var_tokenizer", task="autoencode")
class VARTokenizerLearner(Learner):
    """Reconstruction: squared error of pixels, optionally the distance of a frozen network's features, and the quantizer's loss.

    The authors also train against a discriminator, with unreleased code; this learner has none.
    """

    model: Any
    idle: Tensor
    """Number of steps since each code was used, (V,)."""

    class Settings(Section):
        """Settings of the tokenizer's training.

        Args:
            quantizer: weight of the quantizer's loss.
            perceptual: model with published weights whose features of both images are compared, such as "timm/vgg16.tv_in1k";
                None: none.
            perceptual_weight: weight of the distance of features.
            revive: number of steps without use after which a code is replaced by a feature vector; 0: never, as in the authors' code.
        """

        quantizer: Annotated[float, Field(ge=0)] = 1.0
        perceptual: str | None = None
        perceptual_weight: Annotated[float, Field(ge=0)] = 1.0
        revive: Annotated[int, Field(ge=0)] = 0

    usage = "vitarium train var_pico --set objective.tokenizer={file}"

    def __init__(self, model: VARTokenizer, settings: Any = None):
        super().__init__(model, settings)
        self.judge: nn.Module | None = None
        self.register_buffer("idle", torch.zeros(model.vocab_size, dtype=torch.int64))
        self._wanted: Tensor | None = None
        """Quantized feature vectors of this step's images, (N, C)."""

    @classmethod
    def create(
        cls, name: str | nn.Module, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None
    ) -> VARTokenizerLearner:
        from vitarium.catalog import create_model

        model = build_model(name, data, _sized(name, data, recipe), pretrained=pretrained, checkpoint=checkpoint)
        if not isinstance(model, VARTokenizer):
            raise UsageError(f"the objective var_tokenizer trains var_tokenizer_* models, got {name}")
        created = cls(model, recipe.settings_of(cls))
        if created.settings.perceptual:
            created.judge = create_model(created.settings.perceptual, pretrained=True).eval().requires_grad_(False)
        return created

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        image = batch["image"]
        coded = self.model.quantizer(self.model.features(image))
        if self.training and self.settings.revive:
            used = torch.cat(coded.indices, 1).flatten().bincount(minlength=len(self.idle)) > 0
            self.idle.add_(1).masked_fill_(used, 0)
            self._wanted = torch.cat(coded.places, 1).flatten(0, 1)
        made = self.model.decoder(self.model.from_codes(coded.features))  # not clamped: the clamp has no gradient outside
        losses = {"pixels": F.mse_loss(made, image), "quantizer": coded.loss}
        total = losses["pixels"] + self.settings.quantizer * losses["quantizer"]
        if self.judge is not None:
            losses["perceptual"] = perceptual_distance(self.judge, made, image)
            total = total + self.settings.perceptual_weight * losses["perceptual"]
        return {"loss": total, **losses}

    @torch.no_grad()
    def after_step(self, step: int, total_steps: int) -> None:
        """Replace unused codes by this step's feature vectors; not in the last fifth of the training."""
        if self._wanted is None or step > 0.8 * total_steps:
            return
        codes, idle = self.model.quantizer.codebook.weight, self.idle > self.settings.revive
        chosen = torch.randint(len(self._wanted), (len(codes),), device=codes.device)
        codes.copy_(torch.where(idle[:, None], self._wanted[chosen].to(codes), codes))
        self.idle.masked_fill_(idle, 0)
        self._wanted = None
        if dist.is_available() and dist.is_initialized():  # the images differ between processes
            dist.broadcast(codes, 0)
            dist.broadcast(self.idle, 0)


@learner("var", task="generate")
class VARLearner(Learner):
    """Cross entropy of every code of every scale, given the class and the sum of the earlier scales."""

    model: Any

    class Settings(Section):
        """Settings of VAR's training.

        Args:
            tokenizer: file of a trained tokenizer (`vitarium train var_tokenizer`), which becomes part of the trained model.
                None: that of the checkpoint from which training starts.
            label_drop: share of images trained on without their class, for guidance.
            judge: feature extractor of the Fréchet distance: "pixels" (8x8 grey levels), a model's name, or a file.
            samples: images generated for the distance at an evaluation, in each process; 0: none, and no distance.
        """

        tokenizer: str | None = None
        label_drop: Annotated[float, Field(ge=0, lt=1)] = 0.1
        judge: str = "pixels"
        samples: Annotated[int, Field(ge=0)] = 256

    primary_metric = ("loss", "min")

    @classmethod
    def create(
        cls, name: str | nn.Module, data: ImageData, recipe: Recipe, *, pretrained: bool = False, checkpoint: str | None = None
    ) -> VARLearner:
        settings = recipe.settings_of(cls)
        if settings.tokenizer is None and checkpoint is None and not pretrained:
            raise UsageError(
                "VAR needs a trained tokenizer: run 'vitarium train var_tokenizer_pico' "
                "and pass its file with --set objective.tokenizer=FILE"
            )
        codec: Any = _tokenizer(settings.tokenizer) if settings.tokenizer else None
        given = {} if codec is None else dict(tokenizer=codec.spec.name, tokenizer_arguments=codec.spec.arguments)
        model = build_model(name, data, _sized(name, data, recipe, codec), pretrained=pretrained, checkpoint=checkpoint, **given)
        if not isinstance(model, VAR):
            raise UsageError(f"the objective var trains var_* models, got {name}")
        if codec is not None:
            model.tokenizer.load_state_dict(codec.state_dict())
        return cls(model, settings)

    def __init__(self, model: VAR, settings: Any = None):
        super().__init__(model, settings)
        self.model.tokenizer.requires_grad_(False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        dropped = torch.rand(len(batch["target"]), device=batch["target"].device) < self.settings.label_drop
        labels = batch["target"].masked_fill(dropped, self.model.num_classes)
        self.model.tokenizer.eval()
        losses = self._losses(self.model, batch["image"], labels)
        return {"loss": losses.mean()}

    @staticmethod
    def _losses(model: Any, image: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of each code, (B, L)."""
        with torch.no_grad():
            codes = model.tokenizer.encode(image)
            views = model.tokenizer.inputs(codes)
        return F.cross_entropy(model.transformer(views, labels).transpose(1, 2), torch.cat(codes, 1), reduction="none")

    def model_inputs(self, batch: Batch) -> dict[str, Any]:
        return {"image": batch["image"], "labels": batch["target"]}

    def metrics(self) -> Any:
        """Return the task's metrics, loss (mean over all codes) and scale_losses (the mean of each scale; ln V is chance)."""
        from torchmetrics import MeanMetric

        losses = [MeanMetric(nan_strategy="disable") for _ in range(1 + len(self.model.scales))]
        return nn.ModuleDict({"losses": nn.ModuleList(losses), **super().metrics()})

    def evaluate_batch(self, model: Any, batch: Batch, metrics: Any) -> None:
        losses = self._losses(model, batch["image"], batch["target"])
        for metric, part in zip(metrics["losses"], (losses, *losses.split(list(model.transformer.lengths), 1)), strict=True):
            metric.update(part)
        super().evaluate_batch(model, batch, metrics)

    def summary(self, metrics: Any) -> dict[str, Any]:
        loss, *scales = (metric.compute().item() for metric in metrics["losses"])
        return {"loss": loss, "scale_losses": scales, **super().summary({k: v for k, v in metrics.items() if k != "losses"})}


def _tokenizer(file: str) -> Any:
    from vitarium.catalog.saving import load

    model: Any = load(file)
    if isinstance(model, VAR):
        model = model.tokenizer
    if not hasattr(model, "scales") or not hasattr(model, "encode"):
        raise UsageError(f"{Path(file)} holds a {type(model).__name__}, which is not a tokenizer of images; name a trained tokenizer")
    return model


def _sized(name: str | nn.Module, data: ImageData, recipe: Recipe, codec: Any = None) -> Recipe:
    """Return the recipe without the size of the data's images: they are resized to the model's size, which its scales determine.

    Raises:
        UsageError: the recipe sets another size.
    """
    from vitarium.catalog import find_model

    if not isinstance(name, str):
        return recipe
    family, variant = find_model(name)
    size = codec.image_size if codec is not None else recipe.model_arguments.get("image_size") or family.variants[variant].get("image_size")
    if recipe.image_size not in (None, data.image_size, size):
        raise UsageError(f"{name} takes images of {size} pixels, which its scales fix; got image_size={recipe.image_size}")
    return recipe.model_copy(update=dict(image_size=size))


def perceptual_distance(judge: Any, made: Tensor, image: Tensor) -> Tensor:
    """Return the mean squared distance of unit features of images in [-1, 1], averaged over the network's stages. A scalar."""
    mean, std = (torch.tensor(v, device=image.device, dtype=image.dtype)[:, None, None] for v in _statistics(judge))
    maps = judge.forward_intermediates(((torch.cat([made, image]) + 1) / 2 - mean) / std, intermediates_only=True)
    pairs = (F.normalize(features, dim=1).chunk(2) for features in maps)
    return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()


def _statistics(judge: nn.Module) -> tuple[Any, Any]:
    from vitarium.catalog import preprocessing_of

    preprocessing = preprocessing_of(judge)
    return preprocessing.mean, preprocessing.std
