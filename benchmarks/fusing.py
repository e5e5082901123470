"""Time of a fuse next to its bare matrix products, in int8, and for long prompts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from benchmarks.case import Case
from benchmarks.machine import grouped_weights
from benchmarks.rows import Row
from benchmarks.timing import Runs, in_turns, least, milliseconds, ratio, timed
from kvfuse.fusers import Fuser, quantize
from kvfuse.stages.prefill import ModelCaches

SHORT_TOKENS = 256


def fuse(case: Case, caches: ModelCaches, fuser: Fuser | None = None) -> Cache | None:
    """Fuse caches of the prompt, which are overwritten, with the pair's own fuser or another."""
    fusers = [fuser or case.pair.fusers[0]]
    return case.pair.fuse(case.prompt, caches=caches, fusers=fusers, consume=True).cache


def seconds_of_fuse(case: Case, fuser: Fuser | None = None) -> float:
    """Returns the time of one :func:`fuse`."""
    return timed(fuse, case, case.new_caches(), fuser)


def bare_products(case: Case) -> Runs:
    """Returns the matrix products of the pair's fuser and nothing else, in two ways; the quicker one counts."""
    weights = grouped_weights(case.pair.fusers[0])
    groups, inputs, _ = weights[0].shape
    # all fused tokens in one batch, as the fuser sees them
    x = torch.randn(groups, case.fused_tokens, inputs).to(weights[0])  # (G, N, in)
    return {
        "bare products, F.linear": partial(timed, _by_group, x, weights),
        "bare products, bmm": partial(timed, _chain, x, weights, torch.bmm),
    }


def _by_group(x: Tensor, weights: Sequence[Tensor]) -> None:
    for group, rows in enumerate(x):
        _chain(rows, [weight[group] for weight in weights], lambda x, weight: F.linear(x, weight.T))


def _chain(x: Tensor, weights: Sequence[Tensor], multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Each product reads the newest result of its width, so that none fetches more from memory than in the fuser."""
    newest = {x.shape[-1]: x}
    for weight in weights:
        newest[weight.shape[-1]] = multiply(newest[weight.shape[-2]], weight)


@torch.no_grad()
def fuse_rows(case: Case) -> Iterator[Row]:
    """A fuse against its products, and against the same fuser in int8."""
    bare, int8 = bare_products(case), quantize(case.pair.fusers[0], "int8")
    runs: Runs = {
        "fuse alone": partial(seconds_of_fuse, case),
        **bare,
        "fuse alone, int8": partial(seconds_of_fuse, case, int8),
    }
    taken = in_turns(runs, case.repeats)
    for name, seconds in taken.items():
        yield case.timed_row(name, seconds, "s")
    products = least(*(taken[name] for name in bare))
    yield case.timed_row("fuse / bare products", ratio(taken["fuse alone"], products), "x")
    yield case.timed_row("fuse, int8 / fp32", ratio(taken["fuse alone, int8"], taken["fuse alone"]), "x")


@torch.no_grad()
def growth_rows(case: Case) -> Iterator[Row]:
    """Time to fuse a token of a long prompt against a token of a short one."""
    # both lengths take turns, so that they meet the same machine
    cases = {str(tokens): replace(case, tokens=tokens) for tokens in (SHORT_TOKENS, case.tokens)}
    taken = in_turns(
        {tokens: partial(_seconds_per_token, of_length) for tokens, of_length in cases.items()}, case.repeats
    )
    for tokens, seconds in taken.items():
        yield case.timed_row(f"fuse per token, {tokens}", milliseconds(seconds), "ms")
    short, long = taken.values()
    yield case.timed_row(f"fuse per token, {case.tokens} / {SHORT_TOKENS}", ratio(long, short), "x")


def _seconds_per_token(case: Case) -> float:
    return seconds_of_fuse(case) / case.fused_tokens
