"""Modules that two or more systems use, under the field's standard names."""

from vitarium.nn.attention import Attention
from vitarium.nn.backbone import Backbone, Stage, VideoBackbone
from vitarium.nn.convolutions import Conv2d, ConvMlp, ConvNorm, by_images, conv_norm_gelu
from vitarium.nn.folding import fold_norm_after, fold_norm_before, fold_pair
from vitarium.nn.inflation import inflate, inflate_kernel
from vitarium.nn.layers import (
    DropPath,
    LayerNorm2d,
    LayerNorm3d,
    LayerScale,
    Linear,
    Mlp,
    QuickGELU,
    SqueezeExcite,
    drop_path_rates,
    init_convs_by_fan_out,
    init_weights,
    layer_scale_gamma,
)
from vitarium.nn.mixer_pyramid import MixerPyramid
from vitarium.nn.modes import eval_mode, evaluating, frozen_parameters
from vitarium.nn.patch_embed import PatchEmbed
from vitarium.nn.positions import (
    EvalCache,
    RelativePositionBias,
    Resampling,
    apply_rotary,
    fit_position_table,
    resize_position_table,
    rotary_2d,
    sincos_2d,
)
from vitarium.nn.pyramid import TokenPyramid
from vitarium.nn.stages import PyramidStage, conv_patches, per_stage
from vitarium.nn.tokens import TokenBackbone
from vitarium.nn.vit import TransformerBlock, VisionTransformer
from vitarium.nn.window_attention import LayoutCache, WindowAttention

__all__ = [
    "Attention",
    "Backbone",
    "Conv2d",
    "ConvMlp",
    "ConvNorm",
    "DropPath",
    "EvalCache",
    "LayerNorm2d",
    "LayerNorm3d",
    "LayerScale",
    "LayoutCache",
    "Linear",
    "MixerPyramid",
    "Mlp",
    "PatchEmbed",
    "PyramidStage",
    "QuickGELU",
    "RelativePositionBias",
    "Resampling",
    "SqueezeExcite",
    "Stage",
    "TokenBackbone",
    "TokenPyramid",
    "TransformerBlock",
    "VideoBackbone",
    "VisionTransformer",
    "WindowAttention",
    "apply_rotary",
    "by_images",
    "conv_norm_gelu",
    "conv_patches",
    "drop_path_rates",
    "eval_mode",
    "evaluating",
    "fit_position_table",
    "fold_norm_after",
    "fold_norm_before",
    "fold_pair",
    "frozen_parameters",
    "inflate",
    "inflate_kernel",
    "init_convs_by_fan_out",
    "init_weights",
    "layer_scale_gamma",
    "per_stage",
    "resize_position_table",
    "rotary_2d",
    "sincos_2d",
]
