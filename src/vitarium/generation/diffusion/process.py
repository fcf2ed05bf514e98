"""Noising processes with their samplers, in a text form such as "flow:path=linear,data_at=0" or "gaussian:schedule=cosine".

The learner's settings hold this text, so that a saved file samples as it was trained.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import Tensor

from vitarium.assignments import parse_call
from vitarium.catalog.options import check_names
from vitarium.errors import UsageError, nearest
from vitarium.generation.diffusion import samplers
from vitarium.generation.diffusion.flow import Flow
from vitarium.generation.diffusion.gaussian import GaussianDiffusion
from vitarium.generation.diffusion.samplers import Noise, Predict

Process = Flow | GaussianDiffusion
KINDS: dict[str, type[Flow] | type[GaussianDiffusion]] = {"flow": Flow, "gaussian": GaussianDiffusion}
FIRST_STEP = 1e-3
"""Distance from the noise end at which a stochastic sampler with the path's own diffusion begins (SiT's number)."""
SAMPLERS = {"flow": ("euler", "heun", "dopri5", "sde"), "gaussian": ("ddim", "ddpm")}
"""Samplers of each process; also accepted are class names of diffusers' schedulers. The first is the default."""


@functools.cache
def parse_process(text: str) -> Process:
    """Parse a process, KIND or KIND:NAME=VALUE,... with the fields of `Flow` or `GaussianDiffusion`.

    Raises:
        UsageError: unknown kind or field, or an invalid value.
    """
    kind, values = parse_call(text)
    if kind not in KINDS:
        raise UsageError(f"a diffusion process must be one of {', '.join(KINDS)}; got {text!r}{nearest(kind, KINDS)}")
    check_names(kind, values, [field.name for field in dataclasses.fields(KINDS[kind])])
    try:
        return KINDS[kind](**values)
    except TypeError as error:
        raise UsageError(f"cannot read the diffusion process {text!r}: {error}") from error


def kind_of(process: Process) -> str:
    """Return "flow" or "gaussian"."""
    return "flow" if isinstance(process, Flow) else "gaussian"


def sample(
    process: Process,
    predict: Predict,
    noise: Tensor,
    *,
    steps: int = 50,
    sampler: str | None = None,
    clip: bool = False,
    generator: Noise | None = None,
    **options: Any,
) -> Tensor:
    """Sample from noise (B, C, H, W), in the noise's dtype (float64 is best; the model may have another).

    Args:
        process: the one that the model was trained with.
        predict: the model with its labels, see `guided`.
        noise: standard normal.
        steps: number of sampling steps.
        sampler: "euler", "heun", "dopri5" or "sde" of a flow, "ddim" or "ddpm" of Gaussian diffusion, or the class name of a scheduler of
            diffusers, such as "UniPCMultistepScheduler". None: the first.
        clip: whether Gaussian diffusion clips its estimate of the data to [-1, 1] (for pixels).
        generator: of the noise that a stochastic sampler adds; an `ImageNoise` makes each image independent of its batch.
        options: of `samplers.sde` (form, norm, solver, last), `ddim` (eta), `dopri5` (rtol, atol), or the scheduler's configuration.

    Raises:
        UsageError: the process has no such sampler, or the sampler no such option.
    """
    kind = kind_of(process)
    name = sampler or SAMPLERS[kind][0]
    if name.endswith("Scheduler"):
        from vitarium.generation.diffusion.schedulers import sample_with

        return sample_with(name, process, predict, noise, steps=steps, generator=generator, **options)
    if name not in SAMPLERS[kind]:
        hint = nearest(name, SAMPLERS[kind])
        raise UsageError(f"the sampler of a {kind} must be {', '.join(SAMPLERS[kind])} or a scheduler of diffusers, got {name!r}{hint}")
    taken = {"sde": ("form", "norm", "solver", "last"), "ddim": ("eta",), "dopri5": ("rtol", "atol")}.get(name, ())
    if wrong := [option for option in options if option not in taken]:
        raise UsageError(f"the sampler {name} has no option {wrong[0]!r} (it has {', '.join(taken) or 'none'})")
    if isinstance(process, GaussianDiffusion):
        grid = process.grid(steps, stride=name == "ddim")
        return getattr(samplers, name)(predict, noise, process, grid, clip=clip, generator=generator, **options)
    velocity = process.velocities(predict)
    if name == "sde":
        start = 1 - FIRST_STEP if options.get("form") == "vp" else 1.0  # the rate of "vp" is infinite at the noise end
        times = process.grid(steps, stochastic=True, start=start)
        return samplers.sde(velocity, noise, times, process.way, generator=generator, **options)
    return getattr(samplers, name)(velocity, noise, process.grid(steps), **options)
