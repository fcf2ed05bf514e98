"""A model and its peer, the best public implementation of the same function, with equal weights and outputs proven equal."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vitarium.catalog import Family, create_model, find_model
from vitarium.catalog.calling import call, example_inputs
from vitarium.catalog.create import preprocessing_of
from vitarium.catalog.foreign import is_foreign
from vitarium.catalog.saving import load
from vitarium.efficiency.export import export
from vitarium.errors import UsageError
from vitarium.files import is_model_file
from vitarium.nn import Backbone

Forward = Callable[..., Any]
WRITTEN_OUT = "its equations, written out"
"""Name of the peer if no public implementation is known and a reference stands in."""


class OutputsDiffer(RuntimeError):
    """Our model and the peer compute different functions; nothing is timed."""


def peer_of(family: Family, variant: str) -> str:
    """Return the public implementation that a variant is compared with, "timm/NAME": that of its weights' source; "" if none is known."""
    sources = [source for tag in family.weights.get(variant, {}).values() for source in tag]
    names = [source.removeprefix("timm:").partition(".")[0] for source in sources if source.startswith("timm:")]
    return f"timm/{names[0]}" if names else ""


@dataclass(frozen=True)
class Contest:
    """A model and its peer, with equal weights and outputs checked to be equal.

    Attributes:
        model, peer_name: their names.
        image_size: side in pixels.
        ours, trained: our model after `fuse()`, and in training.
        peer: a module, or a function of an image, which cannot be trained; None for none.
        error: see `Row`.
        graphs: exported graphs of the modules that were timed as such, by the module's id.
    """

    model: str
    peer_name: str
    image_size: int
    ours: nn.Module
    trained: nn.Module
    peer: nn.Module | Forward | None
    error: float | None
    graphs: dict[int, bytes] = field(default_factory=dict, repr=False)

    def graph_of(self, module: nn.Module) -> bytes:
        """Return the ONNX graph of one of the modules, which is exported and compared with it once.

        Raises:
            UsageError: the module is not float32 on the CPU, or cannot be exported.
        """
        if id(module) not in self.graphs:
            place = next(module.parameters(), torch.empty(0))
            if place.dtype is not torch.float32 or place.device.type != "cpu":
                raise UsageError(
                    f"exported graphs are timed in float32 on the CPU, and {self.model} is {str(place.dtype)[6:]} on {place.device}"
                )
            with tempfile.TemporaryDirectory() as folder:
                self.graphs[id(module)] = export(module, Path(folder) / "model.onnx", image_size=self.image_size).path.read_bytes()
        return self.graphs[id(module)]


def prepare(
    name: str,
    *,
    peers: bool = True,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    reference: Callable[[nn.Module], nn.Module | Forward] | None = None,
) -> Contest:
    """Create our model and its peer with the same random weights, without stochastic depth (its defaults differ).

    Args:
        reference: stands in for a public peer: our model -> the same function computed otherwise, either from our model's weights,
            or as a module with its own weights that it loads into the given model.
        The others as for `bench`.

    Raises:
        UsageError: the model is not ours.
        OutputsDiffer: the outputs differ beyond rounding.
    """
    if is_foreign(name) or is_model_file(name):
        return _alone(name, image_size=image_size, dtype=dtype, device=device)
    family, variant = find_model(name)
    size = image_size or family.preprocessing(variant).image_size
    peer_name = peer_of(family, variant) if peers else ""
    torch.manual_seed(0)
    plain: dict[str, Any] = {"drop_path_rate": 0.0} if "drop_path_rate" in inspect.signature(family.cls).parameters else {}
    ours = create_model(name, image_size=size, **plain)
    peer: nn.Module | Forward | None = None
    if peer_name:
        classes = getattr(ours, "num_classes", None)  # timm's may have the classes of a larger data set
        peer = _scattered(create_model(peer_name, num_classes=classes, image_size=size, drop_path_rate=0.0))
        names = family.dialects
        ours.load_state_dict(names.get("timm", names.get("official", dict))(peer.state_dict()))
    elif peers and reference is not None:
        twin = copy.deepcopy(_scattered(ours))
        peer = reference(twin.eval())
        if isinstance(peer, nn.Module):
            ours.load_state_dict(twin.state_dict())
        else:
            peer = reference(twin.to(device, dtype))
        library = type(peer).__module__.partition(".")[0]
        peer_name = library if isinstance(peer, nn.Module) and library != "vitarium" else WRITTEN_OUT
    trained = copy.deepcopy(ours).to(device, dtype).eval()
    ours = (ours.fuse() if isinstance(ours, Backbone) else ours).to(device, dtype).eval()
    if isinstance(peer, nn.Module):
        peer = peer.to(device, dtype).eval()
    error = _difference(ours, peer, size) if peer is not None else None
    return Contest(name, peer_name, size, ours, trained, peer, error)


def _alone(name: str, *, image_size: int | None, dtype: torch.dtype, device: str) -> Contest:
    """Create a model without a peer: another library's, which is the public implementation itself, or the one of a saved file.

    Raises:
        UsageError: an image size for a file; its model keeps its own.
    """
    if is_model_file(name):
        if image_size is not None:
            raise UsageError(f"{name} is timed at its own image size; leave --image-size out")
        model = load(name)
    else:
        model = create_model(name, image_size=image_size)
    size = image_size or preprocessing_of(model).image_size
    trained = model.to(device, dtype).eval()
    fused = isinstance(model, Backbone) and not getattr(model, "methods", None)
    ours: nn.Module = copy.deepcopy(trained).fuse().eval() if fused else trained  # type: ignore[operator]
    return Contest(name, "", size, ours, trained, None, None)


def _scattered(model: nn.Module) -> nn.Module:
    """Randomise layer scales and biases, whose initial values are constant."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def _difference(ours: nn.Module, peer: nn.Module | Forward, size: int) -> float:
    """Return the largest difference of any output, in standard deviations of the peer's."""
    inputs = example_inputs(ours, 2, size)
    with torch.inference_mode():
        wanted, found = floating(peer(*inputs.values())), floating(call(ours, inputs))
    if [t.shape for t in wanted] != [t.shape for t in found]:
        shapes = [", ".join(str(tuple(t.shape)) for t in some) for some in (found, wanted)]
        raise OutputsDiffer(f"outputs {shapes[0]} differ in shape from the peer's, {shapes[1]}: nothing is timed")
    error = max(((a.double() - b.double()).abs().max() / b.double().std()).item() for a, b in zip(found, wanted, strict=True))
    limit = 1e-3 if wanted[0].dtype is torch.float32 else 0.2
    if not error < limit:
        raise OutputsDiffer(f"outputs differ from the peer's by {error:.2g} standard deviations (at most {limit:g}): nothing is timed")
    return error


def floating(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of a model's output, in order."""
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
