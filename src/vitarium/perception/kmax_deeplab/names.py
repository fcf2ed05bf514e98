"""Renaming of the authors' parameters (github bytedance/kmax-deeplab, in detectron2's layout)."""

from __future__ import annotations

import re

from torch import Tensor

from vitarium.catalog.registry import chain, find_model, rename

State = dict[str, Tensor]

_ATTENTION = (
    (r"\.qkv_transform\.conv\.", ".qkv."),
    (r"\._(query|key|value)_rpe\._embeddings\.weight$", r".\1_position.table"),
    (r"\._batch_norm_qkv\.", ".qkv_norm."),
    (r"\._batch_norm_similarity\.", ".similarity_norm."),
    (r"\._batch_norm_retrieved_output\.", ".output_norm."),
)
_PREDICTOR = (
    (r"\._pixel_space_head_conv0bnact\.", ".pixels.0."),
    (r"\._pixel_space_head_conv1bnact\.", ".pixels.1."),
    (r"\._pixel_space_head_last_convbn\.", ".pixels.2."),
    (r"\._transformer_mask_head\.", ".kernel."),
    (r"\._transformer_class_head\.conv\.", ".head."),
    (r"\._pixel_space_mask_batch_norm\.", ".mask_norm."),
)
_LAYER = (
    (r"\._query_conv1_bn_act\.", ".query."),
    (r"\._pixel_conv1_bn_act\.", ".pixel."),
    (r"\._pixel_v_conv_bn\.", ".value."),
    (r"\._query_qkv_conv_bn\.", ".qkv."),
    (r"\._query_self_attention\._batch_norm_similarity\.", ".attention.similarity_norm."),
    (r"\._query_self_attention\._batch_norm_retrieved_value\.", ".attention.value_norm."),
    (r"\._query_conv3_bn\.", ".attention_proj."),
    (r"\._query_ffn_conv1_bn_act\.", ".ffn.0."),
    (r"\._query_ffn_conv2_bn\.", ".ffn.1."),
    (r"\._kmeans_query_batch_norm_retrieved_value\.", ".update.norm."),
    (r"\._kmeans_query_conv3_bn\.", ".update_proj."),
)
_SEMANTIC = (
    (r"\._aspp\._aspp_conv(\d)\.", r".context.\1."),
    (r"\._aspp\._aspp_pool\.", ".context_pool."),
    (r"\._aspp\._proj_conv_bn_act\.", ".context_proj."),
    (r"\._low_level_projection_os8\.", ".low.0."),
    (r"\._low_level_projection_os4\.", ".low.1."),
    (r"\._low_level_fusion_os8_conv(\d)_bn_act\.", r".fusion.0.\1."),
    (r"\._low_level_fusion_os4_conv(\d)_bn_act\.", r".fusion.1.\1."),
    (r"\.conv_block_(\d)\.", r".blocks.\1."),
    (r"\.final_conv\.conv\.", ".head."),
)
_BLOCK = (
    (r"\._conv1_bn_act\.", ".reduce."),
    (r"\._conv2_bn_act\.", ".mix."),
    (r"\._conv3_bn\.", ".expand."),
    (r"\._shortcut\.", ".shortcut."),
    (r"\._attention\._(height|width)_axis\.", r".mix.0.\1."),
)
_PLACES = (
    (r"^criterion\.|^pixel_(?:mean|std)$", None),
    (r"^sem_seg_head\.pixel_decoder\._in_norms\.", "pixel_decoder.in_norms."),
    (r"^sem_seg_head\.pixel_decoder\._stages\.(\d+)\._blocks\.(\d+)\.", r"pixel_decoder.stages.\1.\2."),
    (r"^sem_seg_head\.predictor\._kmax_transformer_layers\.(\d+)\._predcitor\.", r"layers.\1.predictor."),
    (r"^sem_seg_head\.predictor\._kmax_transformer_layers\.(\d+)\.", r"layers.\1."),
    (r"^sem_seg_head\.predictor\._predcitor\.", "predictor."),
    (r"^sem_seg_head\.predictor\._cluster_centers\.weight$", "queries"),
    (r"^sem_seg_head\.predictor\._(class|mask)_embedding_projection\.", r"\1_query."),
    (r"^sem_seg_head\.predictor\._auxiliary_semantic_predictor\.", "semantic_head."),
)
_RESNET_PARTS = {"conv1.norm": "bn1", "conv2.norm": "bn2", "conv3.norm": "bn3", "shortcut.norm": "downsample.1", "shortcut": "downsample.0"}
_RESNET = chain(  # detectron2's names -> timm's
    rename(
        (r"^backbone\.stem\.conv1\.norm\.", "backbone.bn1."),
        (r"^backbone\.stem\.", "backbone."),
        *((rf"^backbone\.res{k + 1}\.", f"backbone.layer{k}.") for k in range(1, 5)),
    ),
    rename(*((rf"^(backbone\.layer\d\.\d+)\.{re.escape(theirs)}\.", rf"\1.{ours}.") for theirs, ours in _RESNET_PARTS.items())),
)


def _fuses(state: State) -> State:
    """Rename `_resized_fuses.i`, which joins map i and map i + 1; in our model it belongs to the finer one."""
    pattern = re.compile(r"^sem_seg_head\.pixel_decoder\._resized_fuses\.(\d+)\._conv_bn_(low|high)\.")
    return {pattern.sub(lambda m: f"pixel_decoder.fuses.{int(m[1]) + 1}.{m[2]}.1.", name): tensor for name, tensor in state.items()}


def _backbone(state: State) -> State:
    """Rename a backbone: ConvNeXt by its own family's table, ResNet by detectron2's names."""
    if not any(name.startswith("backbone.downsample_layers.") for name in state):
        return _RESNET(state)
    inside = {name.removeprefix("backbone."): tensor for name, tensor in state.items() if name.startswith("backbone.")}
    renamed = find_model("convnext_tiny")[0].dialects["official"](inside)
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("backbone.")}
    return rest | {f"backbone.{name}": tensor for name, tensor in renamed.items()}


def _split_void(state: State) -> State:
    """Split class layers, whose last row is void, into ours and the layer of void."""
    split: State = {}
    for name, tensor in state.items():
        owner, found, leaf = name.rpartition(".head.")
        if found and not owner.startswith("backbone"):
            split[f"{owner}.head.classes.{leaf}"], split[f"{owner}.head.void.{leaf}"] = tensor[:-1], tensor[-1:]
        else:
            split[name] = tensor
    return split


OFFICIAL = chain(_backbone, _fuses, rename(*_PLACES), rename(*_BLOCK, *_LAYER), rename(*_ATTENTION, *_PREDICTOR, *_SEMANTIC), _split_void)
