"""Time on a GPU, where short prompts are bound by kernel launches and by waiting for the device: both are counted."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.asking import generate, greedy
from benchmarks.case import Case
from benchmarks.fusing import fuse, seconds_of_fuse
from benchmarks.machine import Work
from benchmarks.rows import Row
from benchmarks.timing import Runs, in_turns, milliseconds, ratio, timed
from kvfuse.backends.cuda_graphs import CudaGraphPrefill
from kvfuse.fusers import quantize
from kvfuse.fusers.execution.fold_norms import fold_norms
from kvfuse.model import CacheToCache
from kvfuse.stages.prefill import prefill

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
COPY = "Memcpy DtoH"
WARM_ROUNDS = 3  # kernels are chosen, and graphs recorded, when a shape is first seen
BUSY_PRODUCTS, BUSY_SIDE = 16, 8192  # keep a GPU busy for longer than the host takes to queue a fuse
ANSWER_TOKENS = 65


@torch.no_grad()
def gpu_fuse_rows(case: Case) -> Iterator[Row]:
    """A fuse by itself, behind other work, and in int8; its launches and copies."""
    int8 = quantize(case.pair.fusers[0], "int8")
    runs = {
        "fuse": partial(seconds_of_fuse, case),
        "fuse, int8": partial(seconds_of_fuse, case, int8),
        "fuse, queued behind other work": partial(_seconds_queued, case),
    }
    taken = _warm_turns(case, runs)
    # 1) Times, and the first and last of them over the least possible.
    for name, seconds in taken.items():
        yield case.timed_row(name, milliseconds(seconds), "ms")
    for name in ("fuse", "fuse, queued behind other work"):
        yield case.timed_row(f"{name} / roofline", _over_roofline(case, taken[name]), "x")
    # 2) Launches and copies, which bound short prompts.
    names = _event_names(case)
    yield case.row("kernel launches of a fuse", sum(name.startswith(LAUNCHES) for name in names), "launches")
    yield case.row("device-to-host copies of a fuse", sum(COPY in name for name in names), "copies")


def _seconds_queued(case: Case) -> float:
    """Device time of a fuse that need not wait for the host, as after two prefills."""
    model = case.pair.receiver.model
    caches = case.new_caches()
    busy = torch.empty(BUSY_SIDE, BUSY_SIDE, dtype=model.dtype, device=model.device).normal_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # the device is busy while the host queues the fuse
    for _ in range(BUSY_PRODUCTS):
        torch.mm(busy, busy)
    start.record()
    fuse(case, caches)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _over_roofline(case: Case, taken: list[float]) -> list[float]:
    least = case.machine.seconds(Work.of_fusing(case.pair, case.prompt))
    return [seconds / least for seconds in taken]


def _event_names(case: Case) -> list[str]:
    """Names of all host calls and device activities in one fuse."""
    caches = case.new_caches()
    # nothing older may still be running
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        fuse(case, caches)
        torch.cuda.synchronize()
    return [event.name for event in seen.events()]


@torch.no_grad()
def gpu_folded_rows(case: Case) -> Iterator[Row]:
    """The fuse once more, with folded norms; the fuser stays so."""
    fold_norms(case.pair.fusers[0])
    figure = "fuse, queued behind other work, folded"
    queued = _warm_turns(case, {figure: partial(_seconds_queued, case)})[figure]
    yield case.timed_row(figure, milliseconds(queued), "ms")
    yield case.timed_row(f"{figure} / roofline", _over_roofline(case, queued), "x")


@torch.no_grad()
def gpu_first_token_rows(case: Case) -> Iterator[Row]:
    """With models as loaded, and with prompts read through CUDA graphs; the receiver alone as transformers runs it."""
    pair, captured = case.pair, _captured(case.pair)
    runs = {
        "receiver": partial(timed, generate, pair.receiver, case.prompt.ids, 1),
        "C2C": partial(timed, pair.answer, case.prompt, **greedy(1)),
        "C2C, captured": partial(timed, captured.answer, case.prompt, **greedy(1)),
        "low-rank, captured": partial(timed, captured.answer, case.prompt, fusers=[case.low_rank], **greedy(1)),
    }
    taken = _warm_turns(case, runs)
    for name, seconds in taken.items():
        yield case.timed_row(f"first token, {name}", milliseconds(seconds), "ms")
    yield case.timed_row("first token / receiver's", ratio(taken["C2C"], taken["receiver"]), "x")
    yield case.timed_row("first token / receiver's, captured", ratio(taken["C2C, captured"], taken["receiver"]), "x")
    yield from _prefill_rows(case)


def _prefill_rows(case: Case) -> Iterator[Row]:
    """The prefill of each model: kernels queued one by one, or replayed at once."""
    captured, prompt, reads = CudaGraphPrefill(prefill), case.prompt, case.prompt.sharers[0]
    for name, model, ids, positions in (
        ("receiver", case.pair.receiver.model, prompt.ids, prompt.positions),
        ("sharer", case.pair.sharers[0].model, reads.ids, reads.positions),
    ):
        # the first call records the graph
        inputs = model, ids, torch.ones_like(ids), positions
        runs = {"": partial(timed, case.pair.prefiller, *inputs), ", captured": partial(timed, captured, *inputs)}
        yield case.row(f"{name} prefill, captured, recording", 1e3 * runs[", captured"](), "ms")
        for variant, seconds in _warm_turns(case, runs).items():
            yield case.timed_row(f"{name} prefill{variant}", milliseconds(seconds), "ms")


@torch.no_grad()
def static_rows(case: Case) -> Iterator[Row]:
    """A whole answer over a growing cache, and over a static one, for which transformers compiles the receiver."""
    pair, options, static = case.pair, greedy(ANSWER_TOKENS), {"cache_implementation": "static"}
    alone = partial(timed, generate, pair.receiver, case.prompt.ids, ANSWER_TOKENS)
    runs = {
        "receiver": alone,
        "receiver, static": partial(alone, **static),
        "C2C": partial(timed, pair.answer, case.prompt, **options),
        "C2C, static": partial(timed, pair.answer, case.prompt, **options, **static),
        "C2C, static, captured": partial(timed, _captured(pair).answer, case.prompt, **options, **static),
    }
    # the first answer compiles the receiver
    for name in ("receiver, static", "C2C, static"):
        yield case.row(f"{ANSWER_TOKENS} tokens, {name}, first time", runs[name](), "s")
    for name, seconds in _warm_turns(case, runs).items():
        yield case.timed_row(f"{ANSWER_TOKENS} tokens, {name}", milliseconds(seconds), "ms")


def _captured(pair: CacheToCache) -> CacheToCache:
    return CacheToCache(pair.receiver, pair.sharers, pair.fusers).use_cuda_graphs()


def _warm_turns(case: Case, runs: Runs) -> dict[str, list[float]]:
    in_turns(runs, WARM_ROUNDS)
    return in_turns(runs, case.repeats)
