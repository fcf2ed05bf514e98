"""Graphs opened by ONNX Runtime or OpenVINO, as functions of NumPy arrays. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vitarium.cores import core_count

if TYPE_CHECKING:
    import numpy as np

Session = Callable[..., "list[np.ndarray]"]
"""A graph: function of its inputs, in order, that returns its outputs."""


def open_session(runtime: str, content: bytes, threads: int | None = None) -> Session:
    """Open an ONNX graph.

    Args:
        runtime: "onnxruntime" or "openvino".
        content: the ONNX file. It is given as bytes, so that it cannot name other files.
        threads: None: `thread_count`.

    Raises:
        Exception: the runtime's own, where the content is damaged or has operators that the runtime lacks.
    """
    return SESSIONS[runtime](content, thread_count() if threads is None else threads)


def thread_count() -> int:
    """Return the number of threads for a graph: PyTorch's if it is loaded, else OMP_NUM_THREADS, else the processors of this process."""
    if (torch := sys.modules.get("torch")) is not None:
        return torch.get_num_threads()
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return core_count()


def version_of(runtime: str) -> str:
    """Return the name of a runtime with its installed version."""
    from importlib.metadata import version

    return f"{runtime} {version(runtime)}"


def _onnxruntime(content: bytes, threads: int) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; warnings are about optimizations
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda *values: session.run(None, dict(zip(names, values, strict=True)))


def _openvino(content: bytes, threads: int) -> Session:
    import openvino

    core: Any = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0  # otherwise the inputs of layers with integer weights are rounded to 8 bits
    compiled = core.compile_model(core.read_model(content), "CPU", options)
    request = compiled.create_infer_request()

    def run(*values: np.ndarray) -> list[np.ndarray]:
        request.infer(list(values), share_inputs=True)
        return [request.get_output_tensor(i).data.copy() for i in range(len(compiled.outputs))]

    return run


SESSIONS: dict[str, Callable[[bytes, int], Session]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
"""Opener of each runtime."""
