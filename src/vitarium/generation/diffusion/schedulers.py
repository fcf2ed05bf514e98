"""diffusers' schedulers as samplers of our models, configured to equal our processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitarium.errors import UsageError, nearest, require
from vitarium.generation.diffusion.flow import Flow
from vitarium.generation.diffusion.gaussian import GaussianDiffusion
from vitarium.generation.diffusion.samplers import Noise, Predict
from vitarium.generation.noise import ImageNoise

PREDICTIONS = {"noise": "epsilon", "data": "sample", "v": "v_prediction"}


def scheduler_for(process: Flow | GaussianDiffusion, name: str | None = None, **options: Any) -> Any:
    """Create a scheduler of diffusers, configured for a process.

    Args:
        process: a linear flow, or Gaussian diffusion.
        name: class name; by default FlowMatchEulerDiscreteScheduler, or DDIMScheduler.
        options: further configuration.

    Raises:
        UsageError: unknown scheduler or option, or a path that diffusers does not support.
    """
    diffusers = require("diffusers", "diffusion")
    flow = isinstance(process, Flow)
    name = name or ("FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler")
    known = [n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith(("Flax", "_"))]
    if name not in known:
        raise UsageError(f"diffusers has no scheduler {name!r}{nearest(name, known)}")
    cls = getattr(diffusers, name)
    if isinstance(process, Flow):
        if process.path != "linear":
            raise UsageError(f"diffusers' schedulers support only the linear path, this flow is {process.path!r}; use one of our samplers")
        values: dict[str, Any] = {"shift": process.shift} if name.startswith("FlowMatch") else {}
        if not values:
            values = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": process.shift}
    else:
        values = dict(
            num_train_timesteps=process.steps, trained_betas=process.betas.tolist(), prediction_type=PREDICTIONS[process.prediction]
        )
        if name in ("DDIMScheduler", "DDPMScheduler"):
            values["clip_sample"] = False
    values |= options
    accepted = dict(cls().config)
    if wrong := [key for key in values if key not in accepted]:
        raise UsageError(f"{name} has no option {wrong[0]!r}" + ("" if wrong[0] in options else ", which this process needs"))
    return cls(**values)


def sample_with(
    name: str | Any,
    process: Flow | GaussianDiffusion,
    predict: Predict,
    noise: Tensor,
    *,
    steps: int,
    generator: Noise | None = None,
    **options: Any,
) -> Tensor:
    """Sample from noise with a scheduler of diffusers: its name, or the object.

    Args:
        process: the one that the model was trained with; it defines the meaning of times.
        predict, noise, steps, generator: as for `process.sample`.
        options: of the scheduler's configuration.
    """
    scheduler = scheduler_for(process, name, **options) if isinstance(name, str) else name
    scheduler.set_timesteps(steps, device=noise.device)
    velocity = process.velocities(predict) if isinstance(process, Flow) else predict
    x = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
    source = generator.torch_generators() if isinstance(generator, ImageNoise) else generator
    extra = {"generator": source} if "generator" in scheduler.step.__code__.co_varnames else {}
    for step in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, step) if hasattr(scheduler, "scale_model_input") else x
        if isinstance(process, Flow):
            amount = float(step) / scheduler.config.num_train_timesteps  # amount of noise, diffusers' convention of time
            out = velocity(scaled, amount if process.data_at == 0 else 1 - amount)
            out = out if process.data_at == 0 else -out
        else:
            out = predict(scaled, int(step))[:, : x.shape[1]]
        x = scheduler.step(out, step, x, **extra).prev_sample.to(noise.dtype)
    return x
