"""kMaX-DeepLab's model: backbone, pixel decoder, k-means layers, and the conversion of predictions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.catalog import family
from vitarium.perception.kmax_deeplab.decoder import ClassHead, KMaXLayer, Prediction, Predictor, SemanticHead
from vitarium.perception.kmax_deeplab.names import OFFICIAL
from vitarium.perception.kmax_deeplab.parts import BN_EPS, ConvNorm, truncated_normal
from vitarium.perception.kmax_deeplab.pixel_decoder import PixelDecoder
from vitarium.perception.masks import Segmenter, merge_by_probability
from vitarium.perception.pyramid import create_pyramid, feature_dims, feature_maps, feature_strides, same_batch_norm

CROSS_ATTENTIONS = ("kmeans", "softmax")
COCO_THINGS = 80
"""Number of thing classes among COCO's 133 panoptic categories; they come first."""


def _coco(backbone: str, **arguments: Any) -> dict[str, Any]:
    return dict(backbone=backbone, num_classes=133, things=list(range(COCO_THINGS)), drop_path_rate=0.2, image_size=1281, **arguments)


@family(
    "kmax_deeplab",
    variants={
        "pico": dict(
            backbone="convnext_pico",
            backbone_arguments=dict(depths=[1, 1, 1, 1], dims=[16, 24, 32, 48], patch_size=2),
            num_classes=14,
            things=list(range(8)),
            num_queries=16,
            dec_depths=[1, 1, 1, 1],
            dec_dims=[16, 16, 12, 8],
            layers=[1, 1, 1],
            hidden_dim=32,
            mask_dim=24,
            ffn_dim=128,
            num_heads=4,
            norm_momentum=0.1,
            image_size=64,
        ),
        "resnet50": _coco("timm/resnet50"),  # COCO PQ 53.3
        "convnext_tiny": _coco("convnext_tiny"),  # 67.3 M with the auxiliary head, PQ 55.5
        "convnext_small": _coco("convnext_small"),  # PQ 56.7
        "convnext_base": _coco("convnext_base"),  # PQ 57.2
        "convnext_large": _coco("convnext_large"),  # PQ 57.9
    },
    official=OFFICIAL,
    learner="kmax_deeplab",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bilinear",
    crop_pct=1.0,
)
class KMaXDeepLab(Segmenter):
    """Segment images (B, in_chans, H, W): {"logits" (B, L, K + 1), "masks" (B, L, h, w), "pixels" (B, mask_dim, h, w), "aux": [...]}.

    The last of the K + 1 classes is void; masks are logits over the L queries, at the finest map's size (a quarter of the image's). Each
    entry of "aux" is the prediction of an earlier layer, at its own map's size. In training "semantic" (B, K + 1, h, w) is added.
    H and W may be any that the backbone takes; the authors use sizes 2^k n + 1, such as 641, for which the corners of all maps coincide.

    Args:
        backbone, backbone_arguments: a model with four maps, as for `create_model`.
        num_classes: K.
        things: classes with separate instances; None: all.
        num_queries: L, the largest number of segments of an image.
        dec_depths, dec_dims: blocks and base width of the pixel decoder's stages, from coarse to fine.
        layers: k-means layers on each of its three coarse maps.
        hidden_dim: channels of queries and projected maps.
        mask_dim: channels of the space in which pixels and queries are compared.
        ffn_dim: hidden channels of each layer's FFN.
        num_heads: heads of all attention.
        cross_attention: "kmeans", or "softmax" over the pixels, its baseline.
        drop_path_rate: stochastic depth of the layers' branches.
        norm_momentum: of the batch norms' running statistics.
        thing_threshold, stuff_threshold: least class probability of a segment in `panoptic`; the authors: 0.7 and 0.5 for COCO and
            Cityscapes, 0.4 and 0.4 for ADE20K.

    Raises:
        UsageError: another cross_attention, things that are not classes, or a backbone without four maps.
        InputError: the image is too small, or so large that a map of the axial stages has over 255 cells per side.
    """

    def __init__(
        self,
        *,
        backbone: str,
        backbone_arguments: dict[str, Any] | None = None,
        num_classes: int = 133,
        things: Sequence[int] | None = None,
        num_queries: int = 128,
        dec_depths: Sequence[int] = (1, 5, 1, 1),
        dec_dims: Sequence[int] = (512, 256, 128, 64),
        layers: Sequence[int] = (2, 2, 2),
        hidden_dim: int = 256,
        mask_dim: int = 128,
        ffn_dim: int = 2048,
        num_heads: int = 8,
        cross_attention: str = "kmeans",
        drop_path_rate: float = 0.0,
        norm_momentum: float = 0.01,
        thing_threshold: float = 0.7,
        stuff_threshold: float = 0.5,
        in_chans: int = 3,
    ):  # many arguments: they are the authors' configuration
        if cross_attention not in CROSS_ATTENTIONS:
            raise ValueError(f"cross_attention must be one of {', '.join(CROSS_ATTENTIONS)}, got {cross_attention!r}")
        for name, threshold in (("thing_threshold", thing_threshold), ("stuff_threshold", stuff_threshold)):
            if not 0 <= threshold < 1:
                raise ValueError(f"{name} must be a probability from 0 to below 1, got {threshold}")
        super().__init__(num_classes=num_classes, things=things, in_chans=in_chans)
        self.thresholds = {"thing_threshold": thing_threshold, "stuff_threshold": stuff_threshold}
        self.backbone = create_pyramid(backbone, backbone_arguments, in_chans=in_chans)
        _pad_downsampling(self.backbone)
        same_batch_norm(self.backbone, eps=BN_EPS, momentum=norm_momentum)
        self.min_size = feature_strides(self.backbone)[-1]
        dims = feature_dims(self.backbone)
        self.pixel_decoder = PixelDecoder(dims, dec_depths, dec_dims, num_heads, norm_momentum)
        self.queries = nn.Parameter(torch.empty(hidden_dim, num_queries))
        truncated_normal(self.queries, 1.0)
        self.layers = nn.ModuleList(
            KMaXLayer(
                4 * dim,
                hidden_dim,
                mask_dim=mask_dim,
                ffn_dim=ffn_dim,
                num_heads=num_heads,
                num_classes=num_classes,
                cross_attention=cross_attention,
                drop_path=drop_path_rate,
                momentum=norm_momentum,
            )
            for count, dim in zip(layers, dec_dims, strict=False)
            for _ in range(count)
        )
        self.level_of_layer = [level for level, count in enumerate(layers) for _ in range(count)]
        self.class_query = ConvNorm(hidden_dim, hidden_dim, axes=1, act=True, momentum=norm_momentum)
        self.mask_query = ConvNorm(hidden_dim, hidden_dim, axes=1, act=True, momentum=norm_momentum)
        self.predictor = Predictor(4 * dec_dims[-1], hidden_dim, mask_dim, num_classes, norm_momentum)
        self.semantic_head = SemanticHead((dims[0], dims[1], dims[3]), hidden_dim, num_classes, norm_momentum)

    def forward(self, image: Tensor) -> Prediction:
        self.check_image(image)
        maps = feature_maps(self.backbone, image)
        *coarse, finest = self.pixel_decoder(maps)
        queries = self.queries.expand(image.shape[0], -1, -1)  # len() would fix the batch of an exported graph
        aux: list[Prediction] = []
        for layer, level in zip(self.layers, self.level_of_layer, strict=True):
            queries, prediction = layer(queries, coarse[level])
            aux.append(prediction)
        found = self.predictor(self.mask_query(queries), self.class_query(queries), finest) | {"aux": aux}
        if self.training:
            found["semantic"] = self.semantic_head(maps[0], maps[1], maps[3])
        return found

    # ---- conversion of predictions

    def probabilities(self, logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Convert one image's logits, (L, K + 1), (L, H, W), to classes without void (L, K) and pixels' shares of queries (L, H, W)."""
        return logits.softmax(-1)[:, :-1], masks.softmax(0)

    def panoptic(self, classes: Tensor, masks: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the segments of probabilities (L, K) and (L, H, W); see `merge_by_probability`."""
        return merge_by_probability(classes, masks, self.things, **self.thresholds)

    # ---- heads, groups, checks

    def get_classifier(self) -> list[nn.Module]:
        """Return the layers that depend on the number of classes."""
        return [part.classes for part in self.modules() if isinstance(part, ClassHead)]

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the class layers of all predictors. Numbers in `things` that are no longer classes are removed."""
        for part in self.modules():
            if isinstance(part, ClassHead):
                part.reset(num_classes)
        self.num_classes = num_classes
        self.things = tuple(c for c in self.things if c < num_classes)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay: queries and tables of distances."""
        return {"queries", "*_position.table"}

    def group_matcher(self, coarse: bool = False) -> Any:
        """Group parameters in two layers: with `layer_decay: 0.1` the backbone has a tenth of the rate, as in the authors' training."""
        return lambda name: 0 if name.startswith("backbone.") else 1


def _pad_downsampling(backbone: nn.Module) -> None:
    """Pad before each convolution whose stride equals its size, so that a side of 2^k n + 1 gives 2^(k-1) n + 1 and nothing is cut off.

    The padding is before the norm of a downsampling layer, which turns the zeros into its bias, as in the authors' ConvNeXt. Backbones
    whose convolutions pad by themselves (ResNet) are unchanged.
    """
    places = [(backbone, "stem"), *((stage, "downsample") for stage in getattr(backbone, "stages", ()))]
    for owner, name in places:
        part = getattr(owner, name, None)
        conv = getattr(part, "conv", None)
        if isinstance(part, nn.Sequential) and isinstance(conv, nn.Conv2d) and conv.stride == conv.kernel_size:
            missing = conv.kernel_size[0] - 1
            before, after = missing // 2, missing - missing // 2
            padding = nn.ZeroPad2d((before, after, before, after))
            setattr(owner, name, nn.Sequential(OrderedDict(pad=padding, **part._modules)))
