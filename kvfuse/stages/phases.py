"""Where the time of an answer goes. Phases are timed inside of :func:`measured` only; else they cost a microsecond."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

PHASES = ("hint", "receiver_prefill", "sharer_prefill", "fuse", "first_token", "decode")
"""In their order. A model that reads a prompt and gives its first token in one step does both in its prefill."""


class Stopwatch:
    """Seconds by phase.

    Attributes:
        seconds: Measured so far, by phase (:data:`PHASES`).
        phase: The running one, or None.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.phase: str | None = None
        self._since = 0.0

    def switch(self, phase: str | None) -> None:
        """Wait for the devices, end the running phase, and begin another one, or none."""
        synchronize()
        now = time.perf_counter()
        if self.phase is not None:
            self.seconds[self.phase] += now - self._since
        self.phase, self._since = phase, now


_RUNNING: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


@contextmanager
def measured() -> Iterator[Stopwatch]:
    """A stopwatch for all phases within, in this thread."""
    stopwatch = Stopwatch()
    token = _RUNNING.set(stopwatch)
    try:
        yield stopwatch
    finally:
        _RUNNING.reset(token)


def phase(name: str) -> AbstractContextManager[Stopwatch | None]:
    """Count the time within to a phase. Yields the stopwatch, or None if none runs or a longer phase does."""
    stopwatch = _RUNNING.get()
    if stopwatch is None or stopwatch.phase is not None:
        return nullcontext()
    return _counted(stopwatch, name)


def generation(first: str, options: dict[str, Any]) -> AbstractContextManager[dict[str, Any]]:
    """A phase that becomes ``decode`` at the first token. Yields the options for ``generate``."""
    stopwatch = _RUNNING.get()
    if stopwatch is None or stopwatch.phase is not None:
        return nullcontext(options)
    given = options.get("stopping_criteria") or ()
    criteria = StoppingCriteriaList([*given, _FirstToken(stopwatch)])
    return _counted(stopwatch, first, {**options, "stopping_criteria": criteria})


@contextmanager
def _counted(stopwatch: Stopwatch, name: str, value: Any = None) -> Iterator[Any]:
    stopwatch.switch(name)
    try:
        yield stopwatch if value is None else value
    finally:
        stopwatch.switch(None)


def synchronize() -> None:
    """Wait for every CUDA device that is in use."""
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(device):
                torch.cuda.synchronize(device)


class _FirstToken(StoppingCriteria):
    """Called by ``generate`` after each new token; never stops it."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.stopwatch.phase != "decode":
            self.stopwatch.switch("decode")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
