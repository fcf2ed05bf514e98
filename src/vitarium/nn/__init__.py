"""Modules that two or more systems use, under the field's standard names."""

from vitarium.nn.backbone import Backbone, Stage
from vitarium.nn.layers import DropPath, LayerNorm2d, LayerScale, Mlp, drop_path_rates, init_weights
from vitarium.nn.patch_embed import PatchEmbed

__all__ = ["Backbone", "DropPath", "LayerNorm2d", "LayerScale", "Mlp", "PatchEmbed", "Stage", "drop_path_rates", "init_weights"]
