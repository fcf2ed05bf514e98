"""T-TAME: a small attention module, trained once on a frozen classifier's own predictions, explains any class in one forward pass.

"T-TAME: Trainable Attention Mechanism for Explaining Convolutional Networks and Vision Transformers" (Ntrougkas, Gkalelis and Mezaris,
IEEE Access 2024). From L feature maps f_i of the classifier (of a ViT: tokens after the first norm of its last blocks, class token dropped)

    u_i = ReLU(BN_i(W_i f_i) + f_i)                    1x1 convolution, same channels
    c   = W [u_1 | resize(u_2) | ... | resize(u_L)]    1x1 convolution to one map per class, at the first map's size (at most 56)
    a   = sigmoid(c)

In training the image is multiplied by the mask a_y of the class y that the classifier itself predicts, and the prediction must remain that
class while the masks m become small and smooth:

    loss = 1.5 CE(classifier(x * up(a_y)), y) + 2 mean((m + 0.0005)^0.3) + 0.01 TV(m) / (2 B)

No label of the data is used, and neither weights nor batch statistics of the classifier change. An explanation is c_k (not a_k), stretched
to [0, 1] and enlarged to the image.

Follows the authors' code (IDT-ITI/T-TAME): its versions "TAME" and "TTAME" (`class_token`), the ablations of its paper (`form`), its
maskings (`masks`) and methods of masking (`masked`). As there, m are by default the maps of every image for the labels of the whole batch,
(B, B, h, w), so that TV grows with the batch. Left out: its modules "TAttention" (transformer layers over the taps), "3D-TAME" (volumes),
and methods that learn a norm of the masked image or adapt the weights of the loss; no released file or published number uses them.
Difference: Nesterov SGD with a cosine schedule and linear warm-up in place of OneCycle. Cost: 1 forward pass, and for ViT-B
0.8 of its 17.5 GMACs on top (4.08 M parameters).

B batch, C channels, H and W sides of the image, h and w of a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.catalog.calling import example_image
from vitarium.catalog.create import ModelSpec
from vitarium.catalog.registry import State, chain, family, rename
from vitarium.errors import UsageError
from vitarium.explanation.classifier import describe_classifier, rebuild_classifier
from vitarium.explanation.explainers import Explainer, explainer, scaled
from vitarium.explanation.reading import Tap, covered, find_taps, logits_of, read_maps, to_pixels
from vitarium.nn.inputs import foreign_sizes
from vitarium.nn.modes import evaluating
from vitarium.training import Learner, learner
from vitarium.training.building import open_trained
from vitarium.training.players import ONLY
from vitarium.training.settings import Section

MAX_SIDE = 56
"""Largest side of the maps, cells."""
FLOOR, POWER = 0.0005, 0.3
"""Constants of the area term (m + FLOOR)^POWER, which is steep near 0 and so favours empty masks over faint ones."""

Form = Literal["tame", "sigmoid", "no_skip", "no_skip_no_norm"]
ClassToken = Literal["drop", "multiply"]


class TameAttention(nn.Module):
    """Feature maps to one map per class: [(B, C_i, h_i, w_i)] -> (B, num_classes, h, w), before the sigmoid.

    Args:
        channels: C_i of each feature map.
        num_classes: classes of the classifier.
        form: "tame", or an ablation of the authors: "sigmoid" in place of ReLU; "no_skip", without + f_i and with `num_classes` channels
            in u_i; "no_skip_no_norm", without + f_i and BN_i.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, form: Form = "tame"):
        super().__init__()
        if form not in get_args(Form):
            raise UsageError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
        self.skip, self.activation = form in ("tame", "sigmoid"), torch.sigmoid if form == "sigmoid" else F.relu
        widths = [num_classes] * len(channels) if form == "no_skip" else list(channels)
        self.convs = nn.ModuleList(nn.Conv2d(c, width, 1) for c, width in zip(channels, widths, strict=True))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for width in widths if form != "no_skip_no_norm")
        self.fuser = nn.Conv2d(sum(widths), num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        side = [min(MAX_SIDE, s) for s in features[0].shape[-2:]]
        parts = [conv(f) for f, conv in zip(features, self.convs, strict=True)]
        parts = [bn(u) for u, bn in zip(parts, self.bns, strict=True)] if len(self.bns) else parts
        parts = [u + f for u, f in zip(parts, features, strict=True)] if self.skip else parts
        parts = [self.activation(u) for u in parts]
        return self.fuser(torch.cat([F.interpolate(u, side, mode="bilinear", align_corners=False) for u in parts], dim=1))


def official(state: State) -> State:
    """Rename the authors' Lightning checkpoint: attention module and frozen torchvision classifier (ViT, VGG or ResNet)."""
    vit = rename(
        (r"^generic\.attn_mech\.(?:1\.)?", "attention."),
        (r"^generic\.body\.class_token$", "classifier.cls_token"),
        (r"^generic\.body\.conv_proj\.", "classifier.patch_embed.proj."),
        (r"^generic\.body\.encoder\.pos_embedding$", "classifier.pos_embed"),
        (r"^generic\.body\.encoder\.ln\.", "classifier.norm."),
        (r"^generic\.body\.heads\.head\.", "classifier.head."),
        (r"^generic\.body\.classifier\.0\.", "classifier.pre_logits.fc1."),
        (r"^generic\.body\.classifier\.3\.", "classifier.pre_logits.fc2."),
        (r"^generic\.body\.classifier\.6\.", "classifier.head.fc."),
        (r"^generic\.body\.encoder\.layers\.encoder_layer_(\d+)\.", r"classifier.blocks.\1."),
        (r"^generic\.body\.", "classifier."),
    )
    inside = [
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
        (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    ]
    renamed = chain(vit, *(rename(rule) for rule in inside))(state)
    for name, side in (("fc1", 7), ("fc2", 1)):  # timm's VGG holds its hidden layers as convolutions
        key = f"classifier.pre_logits.{name}.weight"
        if key in renamed and renamed[key].ndim == 2:
            renamed[key] = renamed[key].unflatten(1, (-1, side, side))
    return renamed


def _torchvision(name: str) -> dict[str, Any]:
    """timm's equivalent of a torchvision classifier, with torchvision's preprocessing."""
    return {"name": name, "preprocessing": {"image_size": 224, "interpolation": "bilinear", "crop_pct": 0.875}}


VARIANTS: dict[str, dict[str, Any]] = {
    "vit_base": dict(classifier=_torchvision("timm/vit_base_patch16_224"), taps=tuple(f"blocks.{i}.norm1" for i in (9, 10, 11))),
    "vgg16": dict(classifier=_torchvision("timm/vgg16"), taps=("features.16", "features.23", "features.30")),
    "resnet50": dict(classifier=_torchvision("timm/resnet50"), taps=("layer2", "layer3", "layer4")),
    "pico": dict(classifier="timm/vit_pico", num_classes=10, image_size=16),
    "any": dict(classifier="timm/vit_pico"),
}


@family("t_tame", variants=VARIANTS, official=official, learner="t_tame")
class TTAME(nn.Module):
    """A frozen classifier with its attention module. Called as a module it returns the classifier's output: image (B, C, H, W) -> logits
    (B, num_classes).

    `TTAME.over(model)` adds one to an existing classifier; `vitarium train t_tame --data D --model FILE_OR_NAME` trains it.

    Args:
        classifier: a model's name, a description (`describe_classifier`), or the classifier itself.
        taps: where feature maps are read: names of modules, or numbers of stages; None: the result of `find_taps`.
        channels: channels of these maps; None: found by a forward pass of an example.
        num_classes, image_size: of a classifier that is built here.
        class_token: of a plain vision transformer: "drop" it (the authors' training script), or "multiply" the patches by it, channel by
            channel (their version "TTAME").
        form: of the attention module, see `TameAttention`.

    Raises:
        UsageError: the classifier has no classes, has no such taps, or has no class token to multiply by.
        UnsupportedModel: no module of it returns a map.
    """

    def __init__(
        self,
        classifier: str | Mapping[str, Any] | nn.Module,
        *,
        taps: Sequence[Tap] | None = None,
        channels: Sequence[int] | None = None,
        num_classes: int | None = None,
        image_size: int | None = None,
        class_token: ClassToken = "drop",
        form: Form = "tame",
    ):
        super().__init__()
        if class_token not in get_args(ClassToken):
            raise UsageError(f"class_token must be one of {', '.join(get_args(ClassToken))}, got {class_token!r}")
        self.multiply = class_token == "multiply"
        given = {k: v for k, v in (("num_classes", num_classes), ("image_size", image_size)) if v is not None}
        self.classifier = classifier if isinstance(classifier, nn.Module) else rebuild_classifier(classifier, **given)
        self.classifier.requires_grad_(False).eval()
        self.preprocessing: Any = getattr(self.classifier, "preprocessing", None)
        self.labels: list[str] | None = getattr(self.classifier, "labels", None)
        self.taps: tuple[Tap, ...] = tuple(taps) if taps is not None else find_taps(self.classifier)
        self.num_classes = int(getattr(self.classifier, "num_classes", 0))
        if channels is None:
            self.num_classes, channels = self._look()
        self.attention = TameAttention(channels, self.num_classes, form).to(next(self.classifier.parameters()).dtype)

    def _look(self) -> tuple[int, list[int]]:
        """Return the number of classes, and the channels of the maps at the taps."""
        image = example_image(self.classifier, 2)
        with evaluating(self.classifier):
            logits, maps = read_maps(self.classifier, image, self.taps, multiply=self.multiply)
        return logits.shape[1], [m.shape[1] for m in maps]

    def own_maps(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return maps (B, H, W) in [0, 1] of the predictions, their classes (B,) and probabilities (B,)."""
        logits, c = self.maps(image)
        label = logits.argmax(dim=1)
        maps = scaled(self.enlarged(scaled(pick(c, label)), (image.shape[-2], image.shape[-1])))
        return maps, label, pick(logits.softmax(dim=1), label)

    @classmethod
    def over(
        cls, classifier: nn.Module, *, taps: Sequence[Tap] | None = None, class_token: ClassToken = "drop", form: Form = "tame"
    ) -> TTAME:
        """Wrap this classifier object with a new attention module. The result can be saved if the classifier is from `create_model` or
        `load`."""
        options = {"class_token": class_token, "form": form}
        model = cls(classifier, taps=taps, class_token=class_token, form=form).to(next(classifier.parameters()).device)
        if getattr(classifier, "spec", None) is not None:
            channels = [conv.in_channels for conv in model.attention.convs]
            arguments = {"classifier": describe_classifier(classifier), "taps": list(model.taps), "channels": channels}
            arguments |= {name: value for name, value in options.items() if value not in ("drop", "tame")}
            model.spec = ModelSpec("t_tame_any", arguments)  # type: ignore[assignment]
        return model

    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("reduce", "vpt_proxies"),
        "its maps come from the features of every patch; apply the method to the classifier, and train a new T-TAME",
    )

    @property
    def explained(self) -> nn.Module:
        """The classifier, for explainers that do not use the attention module."""
        return self.classifier

    def train(self, mode: bool = True) -> TTAME:
        """Set the training mode of the attention module; the classifier stays in eval mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        with foreign_sizes(self, image, getattr(self.preprocessing, "channels", None)):
            return logits_of(self.classifier, self.classifier(image))

    def maps(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the classifier's logits (B, num_classes) of images (B, C, H, W), and c (B, num_classes, h, w), in one pass."""
        with torch.no_grad(), foreign_sizes(self, image, getattr(self.preprocessing, "channels", None)):
            logits, features = read_maps(self.classifier, image, self.taps, multiply=self.multiply)
        return logits, self.attention(features)

    def enlarged(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Enlarge maps (B, h, w) to (B, H, W), each cell over the pixels that it was computed from."""
        return to_pixels(maps, size, covered(self.classifier, self.taps[0], (maps.shape[1], maps.shape[2]), size))


def pick(maps: Tensor, classes: Tensor) -> Tensor:
    """Select from maps (B, num_classes, h, w) that of each image's class, (B, h, w)."""
    return maps[torch.arange(len(maps), device=maps.device), classes]


def chosen_maps(maps: Tensor, label: Tensor, logits: Tensor, masks: str) -> Tensor:
    """Select the maps of the terms of area and variation, (B, n, h, w), from all (B, num_classes, h, w).

    Args:
        label: classes (B,) of the images.
        logits: of the masked images, (B, num_classes).
        masks: "random", "diagonal" or "max", see `TTAMELearner.Settings`.
    """
    if masks == "random":
        return maps[:, label]
    if masks == "diagonal":
        return pick(maps, label)[:, None]
    best = logits.topk(min(len(logits), logits.shape[1])).indices
    return maps.gather(1, best[:, :, None, None].expand(-1, -1, *maps.shape[2:]))


def area(masks: Tensor) -> Tensor:
    """Return the mean of (m + 0.0005)^0.3 over masks of any shape, in [0, 1]; a scalar."""
    return (masks + FLOOR).pow(POWER).mean()


def variation(masks: Tensor) -> Tensor:
    """Return the squared differences of neighbours, and 0.3 of the squares on the four edges, of masks (B, ..., h, w), over 2 B; a
    scalar."""
    inside = masks.diff(dim=-2).square().sum() + masks.diff(dim=-1).square().sum()
    edges = sum(edge.square().sum() for edge in (masks[..., 0, :], masks[..., -1, :], masks[..., :, 0], masks[..., :, -1]))
    return (inside + 0.3 * edges) / (2 * len(masks))


@explainer("t_tame")
class TTAMEExplainer(Explainer):
    """Maps of a trained attention module, from one forward pass for any class.

    Raises:
        UsageError: the model has no attention module.
    """

    trained = True

    def __init__(self, model: nn.Module):
        super().__init__(model)
        if not isinstance(model, TTAME):
            raise UsageError(
                f"t_tame explains a classifier by an attention module that was trained on it, and this {type(model).__name__} has none: "
                "vitarium train t_tame --data DATA --model FILE makes one"
            )
        self.tame = model

    def relevance(self, image: Tensor, target: Tensor | None) -> Tensor:
        logits, c = self.tame.maps(image)
        return scaled(pick(c, self.choose(logits, target)))

    def cover(self, maps: Tensor, size: tuple[int, int]) -> tuple[int, int]:
        return covered(self.tame.classifier, self.tame.taps[0], (maps.shape[1], maps.shape[2]), size)


@learner("t_tame", task="explain")
class TTAMELearner(Learner):
    """Learn masks that preserve a frozen classifier's own predictions. Labels of the data are not used.

    Metrics, on held-out images (percent): average drop (lower is better) and increase in confidence of the class if only the largest 100,
    50 or 15 % of its map are kept.
    """

    class Settings(Section):
        """Settings: weights of the terms, and the authors' choices.

        Args:
            cross_entropy, area, variation: weights of the terms.
            masks: maps that the terms of area and variation use: of every image for the labels of the whole batch ("random", as many maps
                of an image as there are images), of its own label ("diagonal"), or of its likeliest classes after masking, as many as
                there are images ("max").
            masked: what the map multiplies: the "normalised" image, so that hidden places take the mean colour, or its "pixels" in [0, 1],
                so that they are black (the authors' methods "renormalize" and "raw_normalize").
            taps: where feature maps are read; None: `find_taps`.
            class_token, form: of the attention module, see `TTAME`.
        """

        cross_entropy: float = 1.5
        area: float = 2.0
        variation: float = 0.01
        masks: Literal["random", "diagonal", "max"] = "random"
        masked: Literal["normalised", "pixels"] = "normalised"
        taps: tuple[str | int, ...] | None = None
        class_token: ClassToken = "drop"
        form: Form = "tame"

    @classmethod
    def create(
        cls, name: str | nn.Module, data: Any, recipe: Any, *, pretrained: bool = False, checkpoint: str | None = None
    ) -> TTAMELearner:
        """Create the learner for a trained classifier, with the classifier's image size.

        Args:
            name: a classifier; a file of `vitarium.save`; or a model's name with `pretrained` or `checkpoint`.
            data, recipe, pretrained, checkpoint: see `Learner.create`.

        Raises:
            UsageError: a name without weights.
        """
        settings = recipe.settings_of(cls)
        model = open_trained(name, "has nothing to explain", pretrained=pretrained, checkpoint=checkpoint)
        if not isinstance(model, TTAME):
            model = TTAME.over(model, taps=settings.taps, class_token=settings.class_token, form=settings.form)
        return cls(model, settings)

    def first_pass(self, batch: dict[str, Any], player: str = ONLY) -> dict[str, Any]:
        """Return the batch with the maps a (B, num_classes, h, w) as "maps", the predicted classes (B,) as "label", and "image" times its
        map."""
        image, model = batch["image"], self.model
        logits, c = model.maps(image)  # type: ignore[operator]
        label, a = logits.argmax(dim=1), c.sigmoid()
        mask = model.enlarged(pick(a, label), (image.shape[-2], image.shape[-1]))  # type: ignore[operator]
        return {**batch, "image": self._masked(image, mask[:, None]), "maps": a, "label": label}

    def _masked(self, image: Tensor, mask: Tensor) -> Tensor:
        """Multiply a normalised image (B, C, H, W), or its pixels, by maps (B, 1, H, W)."""
        if self.settings.masked == "normalised":
            return image * mask
        preparation = self.model.preprocessing
        mean, std = (image.new_tensor(values)[:, None, None] for values in (preparation.mean, preparation.std))
        return ((image * std + mean) * mask - mean) / std

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss terms of the second pass; `batch` is the result of `first_pass`."""
        s, a, label = self.settings, batch["maps"], batch["label"]
        logits = self.model(batch["image"])
        masks = chosen_maps(a, label, logits, s.masks)
        terms = {
            "cross_entropy": s.cross_entropy * F.cross_entropy(logits, label),
            "area": s.area * area(masks),
            "variation": s.variation * variation(masks),
        }
        return {"loss": torch.stack(list(terms.values())).sum(), **{name: term.detach() for name, term in terms.items()}}
