"""Runtimes: what executes a model that is only run, not trained.

    eager        PyTorch, operator by operator
    compile      torch.compile
    onnxruntime  the exported graph in ONNX Runtime, on the CPU
    openvino     the same graph in OpenVINO, on the CPU

    fast = run_with(model, "openvino", source="swin.safetensors")
    fast(image)                                 # a module with the model's attributes, run by OpenVINO

The graph is exported once, compared with the model, and kept beside the model's file (`vitarium.efficiency.runtimes.cache`). A model that a
runtime does not take is refused with the reason.

A method that has a graph of its own for a runtime, such as a quantizer that leaves the choice of integer kernels to it, defines

    graph_tolerance: ClassVar[float] = 0.02
    def write_graph(self, model: nn.Module, runtime: str, path: Path, image_size: int) -> bool

which writes an ONNX file to `path` and returns True, or returns False to have the model exported as usual. It is called for the last method
of `model.methods` when a graph is made. `model` is the model with its methods, in eval mode; the graph has its inputs and outputs, in their
order, and takes any batch.

Every graph is compared with the model in its runtime, by the root mean square of (graph - model) over that of the model's outputs. A graph
of the usual export has to be within `making.TOLERANCE`. A method's own graph may differ by its nature, because its kernels round at other
places: the median over random samples has to be within the method's `graph_tolerance`, and no sample may be beyond `export.WORST`. Without
`graph_tolerance`, `making.TOLERANCE` holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vitarium.errors import UsageError, nearest, require

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

RUNTIMES = ("eager", "compile", "onnxruntime", "openvino")
GRAPHS = ("onnxruntime", "openvino")
"""Runtimes that execute an exported graph, on the CPU."""
EXTRAS = {"onnxruntime": "export", "openvino": "openvino"}
"""The extra that installs each of them."""
COMPILE_LIMIT = 240.0
"""Seconds after which the compilation of a model is given up."""


def check_runtime(runtime: str) -> None:
    """Check that a runtime exists and is installed. Imports no torch.

    Raises:
        UsageError: unknown name; the message has the accepted ones.
        MissingExtra: it is not installed.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"unknown runtime {runtime!r}{nearest(runtime, RUNTIMES)} (runtimes: {', '.join(RUNTIMES)})")
    if runtime in EXTRAS:
        require(runtime, EXTRAS[runtime])


def run_with(
    model: nn.Module,
    runtime: str,
    *,
    source: str | Path | None = None,
    reads: Callable[..., Any] | None = None,
    notify: Callable[[str], None] = lambda text: None,
    compile_limit: float = COMPILE_LIMIT,
) -> nn.Module:
    """Return a module with a model's attributes that is executed by a runtime.

    Attributes and methods are the model's. Methods that would execute a part of the model in PyTorch raise `UsageError`, so that nothing
    runs eagerly unnoticed. `deepcopy` and pickle work; a copy opens the graph again.

    Args:
        model: in eval mode; float32 for a graph.
        runtime: one of `RUNTIMES`; "eager" returns the model itself.
        source: the file of `vitarium.save` that the model was loaded from, if it was not changed since: its graph is kept beside it. None:
            the graph is kept in the user's cache under the hash of the weights.
        reads: function of (model, images) that is executed in place of the model's forward, such as `pooled_features`. The function itself
            takes its result from the returned module (see `vitarium.catalog.features.is_read_by`).
        notify: called with messages about progress.
        compile_limit: seconds for a compilation.

    Raises:
        UsageError: unknown runtime, or one that does not take this model; the message has the reason and what works.
        MissingExtra: the runtime is not installed.
        CheckpointError: the runtime's outputs differ from the model's.
    """
    check_runtime(runtime)
    if runtime == "eager":
        return model
    if runtime == "compile":
        from vitarium.efficiency.runtimes.compiled import Compiled

        return Compiled(model, reads, compile_limit)
    from vitarium.efficiency.runtimes.graph import Graph
    from vitarium.efficiency.runtimes.making import find_graph

    return Graph(model, runtime, reads, find_graph(model, runtime, source=source, reads=reads, notify=notify))
