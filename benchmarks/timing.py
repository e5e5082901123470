"""Timing by turns: whatever else the machine does meanwhile affects all candidates alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from kvfuse.stages.phases import synchronize

Runs = Mapping[str, Callable[[], float]]
"""By name, a call that returns the seconds it took."""


def timed(work: Callable[..., Any], *args: Any, **options: Any) -> float:
    """Returns the seconds of one call; its arguments are made before the clock starts."""
    synchronize()  # a GPU may still be working
    start = time.perf_counter()
    work(*args, **options)
    synchronize()
    return time.perf_counter() - start


def in_turns(runs: Runs, repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each run in each round; in a round every run takes one turn."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            taken[name].append(run())
    return taken


def ratio(taken: Sequence[float], over: Sequence[float]) -> list[float]:
    """Returns the ratios round by round: only times of one round are compared."""
    return [seconds / other for seconds, other in zip(taken, over, strict=True)]


def total(*taken: Sequence[float]) -> list[float]:
    """Returns the sum of each round."""
    return [sum(seconds) for seconds in zip(*taken, strict=True)]


def least(*taken: Sequence[float]) -> list[float]:
    """Returns the least of each round."""
    return [min(seconds) for seconds in zip(*taken, strict=True)]


def milliseconds(taken: Sequence[float]) -> list[float]:
    """Returns seconds as milliseconds."""
    return [1e3 * seconds for seconds in taken]


class TrainerClock(TrainerCallback):
    """Records when each step and each epoch of a training ended."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.epochs: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's hook."""
        self.steps.append(time.perf_counter())

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's hook."""
        self.epochs.append(time.perf_counter())
