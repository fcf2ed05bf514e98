"""Renaming of checkpoints of more than one system: of ConvNeXt's and HorNet's authors, and of plain vision transformers in other libraries
to timm's names, which nn/vit.py shares.

Each renamer is a pure function from state dict to state dict, and also works on meta tensors. A file in another dialect is renamed only in
part; the loader tries all renamers and takes the one that fits most tensors.
"""

from __future__ import annotations

import re

import torch

from vitarium.catalog.registry import Renamer, State, chain, join, part_of, rename

_TRANSFORMERS = chain(
    rename(
        (r"^(?:text_model\.|text_projection\.|logit_scale$|logit_bias$)|position_ids$", None),
        (r"(?:^|\.)(?:pooler\.dense\.\w+|embeddings\.mask_token)$", None),
        (r"^(?:vit|deit|dinov2|dinov2_with_registers|vision_model)\.", ""),
    ),
    rename(
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.class_embedding$", "cls_token"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.position_embeddings?(?:\.weight)?$", "pos_embed"),
        (r"^embeddings\.patch_embeddings?\.(?:projection\.)?", "patch_embed.proj."),
        (r"^pre_layrnorm\.", "norm_pre."),
        (r"^(?:layernorm|post_layernorm)\.", "norm."),
        (r"^(?:cls_)?classifier\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
        (r"^visual_projection\.", "projection."),
        (r"^head\.probe$", "attn_pool.latent"),
        (r"^head\.attention\.in_proj_", "attn_pool.in_proj."),
        (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
        (r"^head\.layernorm\.", "attn_pool.norm."),
        (r"^head\.mlp\.", "attn_pool.mlp."),
        (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
        (r"^decoder\.(?:decoder_layers|decoder_encoder\.layer)\.(\d+)\.", r"decoder_blocks.\1."),
        (r"^decoder\.", ""),
    ),
    rename(
        (r"^((?:decoder_)?blocks\.\d+)\.(?:layernorm_before|layer_norm1)\.", r"\1.norm1."),
        (r"^((?:decoder_)?blocks\.\d+)\.(?:layernorm_after|layer_norm2)\.", r"\1.norm2."),
        (r"^((?:decoder_)?blocks\.\d+)\.attention\.attention\.(query|key|value)\.", r"\1.attn.\2."),
        (r"^((?:decoder_)?blocks\.\d+)\.(?:attention|self_attn)\.q_proj\.", r"\1.attn.query."),
        (r"^((?:decoder_)?blocks\.\d+)\.(?:attention|self_attn)\.k_proj\.", r"\1.attn.key."),
        (r"^((?:decoder_)?blocks\.\d+)\.(?:attention|self_attn)\.v_proj\.", r"\1.attn.value."),
        (r"^((?:decoder_)?blocks\.\d+)\.(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", r"\1.attn.proj."),
        (r"^((?:decoder_)?blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
        (r"^((?:decoder_)?blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
        (r"^((?:decoder_)?blocks\.\d+)\.layer_scale(\d)\.lambda1$", r"\1.ls\2.gamma"),
        (r"^((?:decoder_)?blocks\.\d+)\.mlp\.weights_in\.", r"\1.mlp.fc1."),
        (r"^((?:decoder_)?blocks\.\d+)\.mlp\.(?:weights_out|down_proj)\.", r"\1.mlp.fc2."),
    ),
    join("qkv", "query", "key", "value"),
    join("fc1", "gate_proj", "up_proj"),
)
"""Covers names only; `from_transformers` corrects the shapes."""


def from_transformers(state: State) -> State:
    """Rename transformers' ViT, DeiT, DINOv2 (with registers), CLIP, SigLIP or ViTMAE, in the names of release 5 or of those before it.

    A text tower and MAE's decoder are left out. So are heads whose input differs from timm's: those of DINOv2, CLIP and SigLIP classifiers,
    which average patches.
    """
    contrastive = any(name.endswith("post_layernorm.weight") for name in state)
    state = mae_from_transformers({name: tensor for name, tensor in state.items() if not name.startswith("decoder.")})
    if "pos_embed" in state and state["pos_embed"].ndim == 2:
        state["pos_embed"] = state["pos_embed"][None]
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
    width = state["norm.weight"].shape[0] if "norm.weight" in state else 0
    if contrastive or ("head.weight" in state and state["head.weight"].shape[1] != width):
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    if (projection := state.pop("projection.weight", None)) is not None:
        state |= {"head.weight": projection, "head.bias": torch.zeros_like(projection[:, 0])}
    if "reg_token" in state:  # timm's models with registers add positions to the patches only
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    for kind in ("weight", "bias"):
        if (joint := state.pop(f"attn_pool.in_proj.{kind}", None)) is not None:
            state |= {f"attn_pool.q.{kind}": joint[:width], f"attn_pool.kv.{kind}": joint[width:]}
    return state


def mae_from_transformers(state: State) -> State:
    """Rename transformers' ViTMAEForPreTraining to the names of MAE's authors, decoder included."""
    return _TRANSFORMERS(state)


def from_google(state: State) -> State:
    """Rename a file of Google's vision_transformer or big_vision (JAX, .npz), and transpose its matrices."""
    renamed: State = {}
    for name, tensor in state.items():
        name = re.sub(r"^(?:opt/target|params)/", "", name)
        if found := re.match(r"Transformer/encoderblock_(\d+)/(\w+)/(.+)$", name):
            new, tensor = _google_block(found[1], found[2], found[3], tensor)
        elif name == "embedding/kernel":
            new, tensor = "patch_embed.proj.weight", tensor.permute(3, 2, 0, 1)
        elif name == "head/kernel":
            new, tensor = "head.weight", tensor.T
        elif name.startswith("pre_logits/"):
            continue
        else:
            new = _GOOGLE.get(name, name)
        renamed[new] = tensor
    return join("qkv", "query", "key", "value")(renamed)


_GOOGLE = {
    "cls": "cls_token",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "pos_embedding": "pos_embed",
    "embedding/bias": "patch_embed.proj.bias",
    "Transformer/encoder_norm/scale": "norm.weight",
    "Transformer/encoder_norm/bias": "norm.bias",
    "head/bias": "head.bias",
}


def _google_block(number: str, module: str, rest: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    kind = {"kernel": "weight", "scale": "weight"}.get(rest.rpartition("/")[2], "bias")
    if module.startswith("LayerNorm"):
        return f"blocks.{number}.{'norm1' if module == 'LayerNorm_0' else 'norm2'}.{kind}", tensor
    if module.startswith("MlpBlock"):
        layer = "fc1" if rest.startswith("Dense_0") else "fc2"
        return f"blocks.{number}.mlp.{layer}.{kind}", tensor.T if kind == "weight" else tensor
    part = rest.partition("/")[0]
    if part == "out":
        return f"blocks.{number}.attn.proj.{kind}", tensor.flatten(0, 1).T if kind == "weight" else tensor
    return f"blocks.{number}.attn.{part}.{kind}", tensor.flatten(1).T if kind == "weight" else tensor.flatten()


def from_google_mixer(state: State) -> State:
    """Rename a file of Google's MLP-Mixer (JAX, .npz), such as those of `mixer_models/sam`, to timm's names, and transpose its matrices."""
    renamed: State = {}
    for name, tensor in state.items():
        new = re.sub(r"^(?:opt/target|params)/", "", name)
        for theirs, ours in _GOOGLE_MIXER:
            new = re.sub(theirs, ours, new)
        if name.endswith("/kernel"):
            tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
        renamed[new.replace("/", ".")] = tensor
    return renamed


_GOOGLE_MIXER = (
    (r"^stem/", "stem/proj/"),
    (r"^MixerBlock_(\d+)/LayerNorm_0/", r"blocks/\1/norm1/"),
    (r"^MixerBlock_(\d+)/LayerNorm_1/", r"blocks/\1/norm2/"),
    (r"^MixerBlock_(\d+)/token_mixing/", r"blocks/\1/mlp_tokens/"),
    (r"^MixerBlock_(\d+)/channel_mixing/", r"blocks/\1/mlp_channels/"),
    (r"^pre_head_layer_norm/", "norm/"),
    (r"/Dense_0/", "/fc1/"),
    (r"/Dense_1/", "/fc2/"),
    (r"/(?:kernel|scale)$", "/weight"),
)


VIT_DIALECTS: dict[str, Renamer] = {
    "transformers": from_transformers,
    "google": from_google,
    "mae": rename((r"^decoder[._]|^mask_token$", None)),
}
"""Name of a dialect -> renamer to timm's names. DeiT's and DINOv2's authors use timm's names, or names that timm converts itself."""


CONVNEXT_MLP = ((r"\.pwconv1\.", ".mlp.fc1."), (r"\.pwconv2\.", ".mlp.fc2."))
CONVNEXT = chain(
    part_of("backbone."),  # of a detector or segmenter
    rename(
        (r"^downsample_layers\.0\.0\.", "stem.conv."),
        (r"^downsample_layers\.0\.1\.", "stem.norm."),
        (r"^downsample_layers\.(\d)\.0\.", r"stages.\1.downsample.norm."),
        (r"^downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.conv."),
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"^norm\.", "head_norm."),
        (r"^norm(\d)\.", r"stage_norms.\1."),
    ),
    rename(*CONVNEXT_MLP),
)
"""Names of ConvNeXt's authors, which HorNet's code, built on theirs, has too."""
