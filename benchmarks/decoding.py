"""Time of a token after the first: over a fused cache, and over the receiver's own."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StoppingCriteria, StoppingCriteriaList

from benchmarks.asking import generate, greedy
from benchmarks.case import Case
from benchmarks.fusing import fuse
from benchmarks.rows import Row
from benchmarks.timing import in_turns, milliseconds, ratio
from kvfuse.cache.transformers_cache import CACHE
from kvfuse.stages.phases import synchronize

TOKENS_PER_TURN = 4
"""After the first: few, so that turns are short and the machine is in the same state for both."""


class TokenClock(StoppingCriteria):
    """Records when each new token is there; never stops."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        synchronize()
        self.ends.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def decode_rows(case: Case) -> Iterator[Row]:
    """A few tokens over one cache, then over the other, many times; caches of random values cost what real ones do."""
    pair, prompt, options = case.pair, case.prompt, greedy(1 + TOKENS_PER_TURN)

    def alone(cache: Cache, **more: Any) -> Any:  # transformers' own
        return generate(pair.receiver, prompt.ids, 1 + TOKENS_PER_TURN, **{CACHE: cache}, **more)

    def fused(cache: Cache, **more: Any) -> Any:
        return pair.decode(prompt, cache, **options, **more)

    runs = {
        "receiver": partial(_seconds_per_token, alone, case.new_caches().receiver),
        "C2C": partial(_seconds_per_token, fused, fuse(case, case.new_caches())),
    }
    taken = in_turns(runs, case.repeats)
    for name, seconds in taken.items():
        yield case.timed_row(f"decode per token, {name}", milliseconds(seconds), "ms")
    yield case.timed_row("decode per token / receiver's", ratio(taken["C2C"], taken["receiver"]), "x")


def _seconds_per_token(decode: Callable[..., Any], cache: Cache) -> float:
    """Median over the tokens of a turn without the first, which copies the whole cache."""
    # the cache is copied, since decoding appends to it
    clock = TokenClock()
    decode(copy.deepcopy(cache), stopping_criteria=StoppingCriteriaList([clock]))
    return statistics.median(end - start for start, end in pairwise(clock.ends))
