"""Weights, gradients and optimizer states spread over the processes (torch's `fully_shard`), for models that one device cannot train.

Each block of the model is gathered when it runs and freed afterwards. For evaluation and for checkpoints the whole model is gathered:
checkpoints are those of a single device, and a held-out part of any size can be divided among the processes.
"""

from __future__ import annotations

from typing import Any

from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import nn

from vitarium.errors import UsageError
from vitarium.training.base import Learner, has_players
from vitarium.training.recipe import Recipe


def sharded_strategy(processes: int) -> ModelParallelStrategy:
    """Return Fabric's strategy over all processes."""
    return ModelParallelStrategy(_shard, data_parallel_size=processes, tensor_parallel_size=1)


def is_sharded(fabric: Fabric) -> bool:
    """Return whether parameters are spread over the processes."""
    return isinstance(fabric.strategy, ModelParallelStrategy)


def check_shardable(learner: Learner, recipe: Recipe) -> None:
    """Check that the recipe and the learner work on sharded weights.

    Raises:
        UsageError: one of them needs whole weights at every step.
    """
    if has_players(learner) or len(recipe.phases) > 1 or any(phase.until for phase in recipe.phases):
        raise UsageError("strategy=fsdp serves learners of one player, and recipes of one phase; use strategy=ddp")
    if recipe.ema:
        raise UsageError("a moving average needs the whole weights at every step, which strategy=fsdp avoids; use ema=null or strategy=ddp")
    if learner.eval_model() is not learner.model:
        raise UsageError(f"strategy=fsdp serves learners that evaluate their model itself; use strategy=ddp for {type(learner).__name__}")


def _shard(learner: nn.Module, mesh: Any) -> nn.Module:
    """Shard the blocks first, then the rest of the learner."""
    from torch.distributed.fsdp import fully_shard

    lists = [part for part in learner.modules() if isinstance(part, nn.ModuleList | nn.Sequential) and len(part) > 1]
    for blocks in reversed(lists):  # inner before outer
        for block in blocks:
            if any(p.requires_grad for p in block.parameters()):
                fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(learner, mesh=mesh["data_parallel"])
    return learner


def whole_states(learner: nn.Module, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the full state dicts of learner and optimizer in the first process, as on a single device; must be called in all processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(learner, optimizer, options=options)


def restore_whole(learner: nn.Module, optimizer: Any, learner_state: dict[str, Any], optimizer_state: dict[str, Any]) -> None:
    """Load and shard the state dicts of `whole_states`; every process holds all of them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        learner,
        optimizer,
        model_state_dict=learner_state,
        optim_state_dict=optimizer_state,
        options=StateDictOptions(full_state_dict=True),
    )


def gather_model(learner: Learner, whole: nn.Module) -> None:
    """Copy the current weights of `learner.model` into `whole`, an unsharded model of the same kind; must be called in all processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(learner, options=StateDictOptions(full_state_dict=True))
    whole.load_state_dict({name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")})
