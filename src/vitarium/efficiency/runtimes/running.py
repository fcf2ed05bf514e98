"""A module that stands for a model which another runtime executes."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from vitarium.errors import UsageError

Reads = Callable[..., Any]
"""Function of (model, images) that is executed in place of the model's forward."""


class Running(nn.Module):
    """Base of the modules that `run_with` returns: a model's attributes, with another execution of its forward.

    The model's methods can be called, except for those that would execute its modules in PyTorch.

    Args:
        model: in eval mode.
        runtime: its name, for messages.
        reads: see `run_with`.
    """

    def __init__(self, model: nn.Module, runtime: str, reads: Reads | None):
        super().__init__()
        self.model, self.runtime, self.reads = model, runtime, reads
        self.training = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = super().__getattr__("model")
        value = getattr(model, name)
        if inspect.ismethod(value) and isinstance(value.__self__, nn.Module):
            return functools.partial(self._call, name)
        return value

    def _call(self, name: str, *args: Any, **named: Any) -> Any:
        with self._without_modules(name):
            return getattr(self.model, name)(*args, **named)

    @contextlib.contextmanager
    def _without_modules(self, name: str) -> Iterator[None]:
        """Refuse the execution of the model's modules in PyTorch."""
        own = {id(module) for module in self.model.modules()}

        def refuse(module: nn.Module, _inputs: Any) -> None:
            if id(module) in own:
                raise UsageError(
                    f"{self.runtime} executes {self.what}, and {type(self.model).__name__}.{name} is needed here, which is not in it; "
                    "choose --runtime eager"
                )

        hook = register_module_forward_pre_hook(refuse)
        try:
            yield
        finally:
            hook.remove()

    @property
    def what(self) -> str:
        """The function that is executed, for messages."""
        return f"the {'forward' if self.reads is None else self.reads.__name__} of {type(self.model).__name__}"

    # The names of the model's own parameters and tensors: a hash of the weights is the same in every runtime.

    def state_dict(self, *args: Any, **named: Any) -> Any:
        """Return the model's."""
        return self.model.state_dict(*args, **named)

    def named_parameters(self, *args: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the model's."""
        return self.model.named_parameters(*args, **named)


class Reading(nn.Module):
    """A function of a model and an image as a module.

    Args:
        model: in eval mode.
        reads: see `run_with`.
    """

    def __init__(self, model: nn.Module, reads: Reads):
        from vitarium.catalog import preprocessing_of

        super().__init__()
        self.model, self.reads = model, reads
        self.preprocessing = preprocessing_of(model)
        self.spec, self.labels = getattr(model, "spec", None), getattr(model, "labels", None)

    def forward(self, image: Any) -> Any:
        return self.reads(self.model, image)

    def example_inputs(self, n: int = 1, image_size: Any = None, *, seed: int = 0) -> dict[str, Any]:
        """Return images of the model."""
        from vitarium.catalog.calling import example_inputs

        return {"image": next(iter(example_inputs(self.model, n, image_size, seed=seed).values()))}


def executed(model: nn.Module, reads: Reads | None) -> nn.Module:
    """Return the module that a runtime executes: the model, or a function of it."""
    return model if reads is None else Reading(model, reads)
