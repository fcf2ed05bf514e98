"""Masked autoencoders for chest X-rays: hide 90 %, then classify 14 findings (Xiao et al., "Delving into Masked Autoencoders for
Multi-Label Thorax Disease Classification", 2023).

The method is a recipe, not a new network. X-rays of one view look alike, so that MAE's usual mask of 75 % is too easy: 90 % of the patches
are hidden; crops are mild (half the area at least), since a finding may be small; targets are pixels, not normalised by patch; two decoder
blocks are enough. Fine-tuning decays the rates by 0.55 per layer, augments lightly, and computes

    logits = W LN(mean of patch tokens)          14 binary labels, measured by the mean area under the ROC curve

Follows the authors' code (github lambert-x/medical_mae, on Meta's mae), whose pretrained and fine-tuned files load by name, as do those
of Meta and timm. Left out: the DenseNet autoencoder, and the heat-map masks that no released model uses.

    vitarium train thorax_mae --data XRAYS                                     pretrain
    vitarium train thorax_mae_finetune --data NIH --checkpoint RUN/model.safetensors
    vitarium probe RUN/model.safetensors --data NIH                            k-NN and logistic regression on frozen features
"""

from __future__ import annotations

from typing import Any

import torch

from vitarium.catalog import family, rename
from vitarium.catalog.dialects import from_google, from_transformers, mae_from_transformers
from vitarium.catalog.registry import Renamer, State, chain
from vitarium.nn import VisionTransformer
from vitarium.pretraining.masked_autoencoder import OFFICIAL, MaskedAutoencoder

XRAY: dict[str, Any] = dict(mean=(0.5056,) * 3, std=(0.252,) * 3)
"""Mean and standard deviation of ChestX-ray14, for all three channels."""

ENCODERS = {
    "pico": dict(embed_dim=64, depth=4, num_heads=4, patch_size=4, image_size=16),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16, patch_size=14),
}

_encoder_of_autoencoder = rename((r"^decoder[._]|^mask_token$", None), (r"^encoder\.", ""))
"""Rename an autoencoder's file, ours or the authors', without the parts that only pretraining needs."""


def _with_fresh(norm: str) -> Renamer:
    """Convert an autoencoder to a classifier with a new norm after the pooling: "layer" replaces the encoder's, "batch" follows it."""

    def apply(state: State) -> State:
        state = _encoder_of_autoencoder(state)
        like = state["norm.weight"]
        if norm == "batch":
            return {**state, "head_norm.running_mean": torch.zeros_like(like), "head_norm.running_var": torch.ones_like(like)}
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
        return {**kept, "head_norm.weight": torch.ones_like(like), "head_norm.bias": torch.zeros_like(like)}

    return apply


@family(
    "thorax_mae",
    variants=ENCODERS,  # small: 21.7 M, mean AUC of ChestX-ray14 82.3 %; base: 83.0 %
    official=rename((r"^fc_norm\.", "head_norm.")),
    dialects={
        "mae": _encoder_of_autoencoder,
        "mae, patches": _with_fresh("layer"),
        "mae, probe": _with_fresh("batch"),
        "transformers": from_transformers,
        "transformers, patches": chain(from_transformers, _with_fresh("layer")),
        "transformers, probe": chain(from_transformers, _with_fresh("batch")),
        "google": from_google,
    },
    weights={
        "base": {"mae_in1k": ("timm:vit_base_patch16_224.mae",)},
        "large": {"mae_in1k": ("timm:vit_large_patch16_224.mae",)},
        "huge": {"mae_in1k": ("timm:vit_huge_patch14_224.mae",)},
    },
    learner="multilabel",
    **XRAY,
)
class ThoraxViT(VisionTransformer):
    """Classifier of X-rays (B, 3, H, W), grey on all channels -> independent logits (B, num_classes): the encoder, for fine-tuning.

    A pretrained autoencoder's file (ours, the authors', Meta's) loads into it: the decoder is dropped, and with averaged patches the
    encoder's last norm is replaced by a new one after the mean. Arguments are those of `vitarium.nn.VisionTransformer`.
    """


@family(
    "thorax_mae",
    name="thorax_mae_pretrain",
    variants={
        "pico": dict(ENCODERS["pico"], decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=4),
        "small": dict(ENCODERS["small"], decoder_depth=2),  # 28.7 M, the authors' dec512d2b
        "small_dec128": dict(ENCODERS["small"], decoder_embed_dim=128, decoder_depth=2),  # 22.2 M
        "base": dict(ENCODERS["base"]),  # 111.9 M
        "large": dict(ENCODERS["large"]),
        "huge": dict(ENCODERS["huge"]),
    },
    official=OFFICIAL,
    dialects={"transformers": chain(mae_from_transformers, OFFICIAL)},
    learner="mae",
    **XRAY,
)
class ThoraxAutoencoder(MaskedAutoencoder):
    """Autoencoder for pretraining: X-ray (B, 3, H, W) -> Reconstruction. Arguments are those of `MaskedAutoencoder`."""
