"""Input magnitudes of linear layers on real images, for pruning scores that multiply weights by their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from vitarium.catalog.calling import call
from vitarium.nn.modes import evaluating


def input_sizes(model: nn.Module, layers: Iterable[str], images: Iterable[Any]) -> dict[str, Tensor]:
    """Return the root mean square of each input of linear layers over all tokens of all images: name -> (in_features,), float32.

    Args:
        model: runs once on each batch, in eval mode, without gradients.
        layers: names of linear layers; layers that do not run are left out.
        images: batches (B, C, H, W), or inputs by name (see `vitarium.catalog.calling`).
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            rows = given[0].detach().flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + rows.square().sum(0)  # type: ignore[operator]
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in layers]
    try:
        with evaluating(model):
            for image in images:
                call(model, image)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: (total / max(1, counts[name])).sqrt() for name, total in sums.items()}
