"""What a token costs after the first: over a fused cache, and over the receiver's own."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StoppingCriteria, StoppingCriteriaList

from benchmarks.asking import generate, greedy
from benchmarks.case import Case
from benchmarks.rows import Row
from benchmarks.timing import in_turns, ratio
from kvfuse.cache.transformers_cache import CACHE
from kvfuse.stages.phases import synchronize

TOKENS = 4
"""Of one turn, after the first: few, so that turns are short and the machine is the same for both."""


class TokenClock(StoppingCriteria):
    """When each new token was there; asked whether to stop, it never says so."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        synchronize()
        self.ends.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def decode_rows(case: Case) -> Iterator[Row]:
    """Few tokens over one cache, then over the other, many times; the caches' values are random, which costs the same."""
    pair, prompt = case.pair, case.prompt
    fused = pair.fuse(prompt, caches=case.new_streams(), consume=True).cache
    alone = partial(generate, pair.receiver, prompt.ids, 1 + TOKENS)  # transformers' own, by its own cache
    runs = {
        "receiver": partial(
            _per_token, lambda cache, **options: alone(**{CACHE: cache}, **options), case.new_streams().receiver
        ),
        "C2C": partial(
            _per_token, lambda cache, **options: pair.decode(prompt, cache, **greedy(1 + TOKENS), **options), fused
        ),
    }
    taken = in_turns(runs, case.repeats)
    for name, seconds in taken.items():
        yield case.timed_row(f"decode per token, {name}", [1e3 * one for one in seconds], "ms")
    yield case.timed_row("decode per token / receiver's", ratio(taken["C2C"], taken["receiver"]), "x")


def _per_token(decode: Callable[..., Any], cache: Cache) -> float:
    """Median seconds of a turn's tokens but the first, which moves the whole cache into its place."""
    clock = TokenClock()
    decode(copy.deepcopy(cache), stopping_criteria=StoppingCriteriaList([clock]))
    return statistics.median(after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False))
