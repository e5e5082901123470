"""Fusing alone: beside its bare matrix products, in int8, and of long prompts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import Case
from benchmarks.machine import grouped_weights
from benchmarks.rows import Row
from benchmarks.timing import Runs, in_turns, least, ratio, timed
from kvfuse.fusers import Fuser, quantize

SHORT = 256


def fuse_once(case: Case, fuser: Fuser | None = None) -> float:
    """Seconds of one fuse of what was read, by the pair's own fuser or another."""
    fusers = [fuser or case.pair.fusers[0]]
    return timed(case.pair.fuse, case.prompt, caches=case.new_streams(), fusers=fusers, consume=True)


def bare_products(case: Case) -> Runs:
    """The matrix products of the pair's fuser and nothing else, in two ways, of which the quicker one counts."""
    weights = grouped_weights(case.pair.fusers[0])
    groups, inputs, _ = weights[0].shape
    tokens = case.prompt.ids.numel() - case.batch
    x = torch.randn(groups, tokens, inputs).to(weights[0])
    return {
        "bare products, F.linear": partial(timed, _by_group, x, weights),
        "bare products, bmm": partial(timed, _chain, x, weights, torch.bmm),
    }


def _by_group(x: Tensor, weights: Sequence[Tensor]) -> None:
    for group, mine in enumerate(x):
        _chain(mine, [weight[group] for weight in weights], lambda x, weight: F.linear(x, weight.T))


def _chain(x: Tensor, weights: Sequence[Tensor], multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Each product reads the newest result of its width, so that none has more to fetch than in the fuser."""
    newest = {x.shape[-1]: x}
    for weight in weights:
        newest[weight.shape[-1]] = multiply(newest[weight.shape[-2]], weight)


@torch.no_grad()
def fuse_rows(case: Case) -> Iterator[Row]:
    """A fuse against its products, and against the same fuser in int8."""
    bare, int8 = bare_products(case), quantize(case.pair.fusers[0], "int8")
    runs: Runs = {"fuse alone": partial(fuse_once, case), **bare, "fuse alone, int8": partial(fuse_once, case, int8)}
    taken = in_turns(runs, case.repeats)
    for name, seconds in taken.items():
        yield case.timed_row(name, seconds, "s")
    yield case.timed_row(
        "fuse / bare products", ratio(taken["fuse alone"], least(*(taken[name] for name in bare))), "x"
    )
    yield case.timed_row("fuse, int8 / fp32", ratio(taken["fuse alone, int8"], taken["fuse alone"]), "x")


@torch.no_grad()
def growth_rows(case: Case) -> Iterator[Row]:
    """Whether a token of a long prompt costs more to fuse than one of a short prompt."""
    short = replace(case, tokens=SHORT)
    taken = in_turns({str(one.tokens): partial(_per_token, one) for one in (short, case)}, case.repeats)
    for tokens, seconds in taken.items():
        yield case.timed_row(f"fuse per token, {tokens}", [1e3 * one for one in seconds], "ms")
    yield case.timed_row(
        f"fuse per token, {case.tokens} / {SHORT}", ratio(taken[str(case.tokens)], taken[str(SHORT)]), "x"
    )


def _per_token(case: Case) -> float:
    return fuse_once(case) / (case.prompt.ids.numel() - case.batch)
