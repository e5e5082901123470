"""Seconds of things that take turns, so that whatever else the machine does meanwhile hits all of them alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvfuse.stages.phases import synchronize

Runs = Mapping[str, Callable[[], float]]
"""By name, what says how many seconds it took."""


def timed(work: Callable[..., Any], *args: Any, **options: Any) -> float:
    """Seconds of one call; what it is given is made before the clock starts."""
    synchronize()
    start = time.perf_counter()
    work(*args, **options)
    synchronize()
    return time.perf_counter() - start


def in_turns(runs: Runs, repeats: int) -> dict[str, list[float]]:
    """What each run says it took, as often as there are rounds; one round is every run once."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            taken[name].append(run())
    return taken


def ratio(taken: Sequence[float], over: Sequence[float]) -> list[float]:
    """Round by round: what shared a round is compared."""
    return [one / other for one, other in zip(taken, over, strict=True)]


def total(*taken: Sequence[float]) -> list[float]:
    """Round by round, the sum."""
    return [sum(one) for one in zip(*taken, strict=True)]


def least(*taken: Sequence[float]) -> list[float]:
    """Round by round, the quickest."""
    return [min(one) for one in zip(*taken, strict=True)]
