"""Times of calls in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def paired(
    calls: dict[str, Callable[[], Any]], *, rounds: int, device: torch.device | str = "cpu", least_seconds: float = 0.4
) -> dict[str, list[float]]:
    """Measure the seconds per call of each arm and round. Arms take turns, in an order that rotates with the round.

    Args:
        calls: the arms.
        rounds: turns of each arm, after one that is not counted.
        device: on which the work is done; on a CPU the process's processor time is taken, which other processes disturb less.
        least_seconds: an arm repeats its call in each turn until about this much time is measured, at least once.
    """
    device = torch.device(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def turn(call: Callable[[], Any], repeats: int) -> float:
        _synchronize(device)
        start = clock()
        for _ in range(repeats):
            call()
        _synchronize(device)
        return (clock() - start) / repeats

    for run in calls.values():  # caches, kernel choice, compilation
        run()
    repeats = {arm: max(1, round(least_seconds / max(turn(run, 1), 1e-6))) for arm, run in calls.items()}
    times: dict[str, list[float]] = {arm: [] for arm in calls}
    names = list(calls)
    for i in range(rounds):
        for arm in (*names[i % len(names) :], *names[: i % len(names)]):
            times[arm].append(turn(calls[arm], repeats[arm]))
    return times


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
