"""On a GPU, short prompts are bound by what Python queues and by waiting for the device, so launches and copies are counted."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.asking import generate, greedy
from benchmarks.case import Case
from benchmarks.fusing import fuse_once
from benchmarks.machine import Work
from benchmarks.rows import Row
from benchmarks.timing import Runs, in_turns, ratio, timed
from kvfuse.backends.cuda_graphs import CudaGraphPrefill
from kvfuse.fusers import quantize
from kvfuse.fusers.execution.fold_norms import fold_norms
from kvfuse.model import CacheToCache
from kvfuse.stages.prefill import prefill

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
COPY = "Memcpy DtoH"
WARM = 3  # rounds before what is timed: kernels are chosen, and graphs recorded, when a shape is first seen
BUSY, SIDE = 16, 8192  # products that keep a GPU busy for longer than a fuse takes to queue, and their size
ANSWER = 65  # tokens


@torch.no_grad()
def gpu_fuse_rows(case: Case) -> Iterator[Row]:
    """A fuse on its own, behind other work, and in int8; what it launches and copies."""
    int8, least = quantize(case.pair.fusers[0], "int8"), case.machine.seconds(Work.of_fusing(case.pair, case.prompt))
    taken = _warm_turns(
        case,
        {
            "fuse": partial(fuse_once, case),
            "fuse, int8": partial(fuse_once, case, int8),
            "queued": partial(_queued, case),
        },
    )
    for name in ("fuse", "fuse, int8"):
        yield case.timed_row(name, _ms(taken[name]), "ms")
    yield case.timed_row("fuse, queued behind other work", _ms(taken["queued"]), "ms")
    yield case.timed_row("fuse / roofline", [seconds / least for seconds in taken["fuse"]], "x")
    yield case.timed_row(
        "fuse, queued behind other work / roofline", [seconds / least for seconds in taken["queued"]], "x"
    )
    names = _events(case)
    yield case.row("kernel launches of a fuse", sum(name.startswith(LAUNCHES) for name in names), "launches")
    yield case.row("device-to-host copies of a fuse", sum(COPY in name for name in names), "copies")


def _queued(case: Case) -> float:
    """Seconds that a GPU takes for a fuse where it need not wait for the host, as after two prefills."""
    streams, busy = case.new_streams(), _square(case)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(BUSY):
        torch.mm(busy, busy)
    start.record()
    case.pair.fuse(case.prompt, caches=streams, consume=True)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _square(case: Case) -> Tensor:
    return torch.empty(
        SIDE, SIDE, dtype=case.pair.receiver.model.dtype, device=case.pair.receiver.model.device
    ).normal_()


def _events(case: Case) -> list[str]:
    """Names of all that the host calls and the device does in one fuse."""
    streams = case.new_streams()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        case.pair.fuse(case.prompt, caches=streams, consume=True)
        torch.cuda.synchronize()
    return [event.name for event in seen.events()]


@torch.no_grad()
def gpu_folded_rows(case: Case) -> Iterator[Row]:
    """The fuse once more, after the fuser was folded; it stays so."""
    fold_norms(case.pair.fusers[0])
    queued = _warm_turns(case, {"queued": partial(_queued, case)})["queued"]
    least = case.machine.seconds(Work.of_fusing(case.pair, case.prompt))
    yield case.timed_row("fuse, queued behind other work, folded", _ms(queued), "ms")
    yield case.timed_row(
        "fuse, queued behind other work, folded / roofline", [seconds / least for seconds in queued], "x"
    )


@torch.no_grad()
def gpu_first_token_rows(case: Case) -> Iterator[Row]:
    """As models are loaded, and with prompts read through CUDA graphs, beside the receiver alone as transformers runs it."""
    pair, captured = case.pair, _captured(case.pair)
    runs = {
        "receiver": partial(timed, generate, pair.receiver, case.prompt.ids, 1),
        "C2C": partial(timed, pair.answer, case.prompt, **greedy(1)),
        "C2C, captured": partial(timed, captured.answer, case.prompt, **greedy(1)),
        "low-rank, captured": partial(timed, captured.answer, case.prompt, fusers=[case.low_rank], **greedy(1)),
    }
    taken = _warm_turns(case, runs)
    for name, seconds in taken.items():
        yield case.timed_row(f"first token, {name}", _ms(seconds), "ms")
    yield case.timed_row("first token / receiver's", ratio(taken["C2C"], taken["receiver"]), "x")
    yield case.timed_row("first token / receiver's, captured", ratio(taken["C2C, captured"], taken["receiver"]), "x")
    yield from _prefill_rows(case)


def _prefill_rows(case: Case) -> Iterator[Row]:
    """Reading alone, by each model: its kernels queued one by one, or at once."""
    captured, prompt, reads = CudaGraphPrefill(prefill), case.prompt, case.prompt.sharers[0]
    for name, one, ids, positions in (
        ("receiver", case.pair.receiver, prompt.ids, prompt.positions),
        ("sharer", case.pair.sharers[0], reads.ids, reads.positions),
    ):
        what = one.model, ids, torch.ones_like(ids), positions
        runs = {"": partial(timed, case.pair.prefiller, *what), ", captured": partial(timed, captured, *what)}
        yield case.row(f"{name} prefill, captured, recording", 1e3 * runs[", captured"](), "ms")
        for how, seconds in _warm_turns(case, runs).items():
            yield case.timed_row(f"{name} prefill{how}", _ms(seconds), "ms")


@torch.no_grad()
def static_rows(case: Case) -> Iterator[Row]:
    """A whole answer over a cache that grows, and over a static one, for which transformers compiles the receiver."""
    static = {"cache_implementation": "static"}
    alone = partial(timed, generate, case.pair.receiver, case.prompt.ids, ANSWER)
    runs = {
        "receiver": alone,
        "receiver, static": partial(alone, **static),
        "C2C": partial(timed, case.pair.answer, case.prompt, **greedy(ANSWER)),
        "C2C, static": partial(timed, case.pair.answer, case.prompt, **greedy(ANSWER), **static),
        "C2C, static, captured": partial(timed, _captured(case.pair).answer, case.prompt, **greedy(ANSWER), **static),
    }
    for name in ("receiver, static", "C2C, static"):
        yield case.row(f"{ANSWER} tokens, {name}, first time", runs[name](), "s")
    for name, seconds in _warm_turns(case, runs).items():
        yield case.timed_row(f"{ANSWER} tokens, {name}", _ms(seconds), "ms")


def _captured(pair: CacheToCache) -> CacheToCache:
    return CacheToCache(pair.receiver, pair.sharers, pair.fusers).use_cuda_graphs()


def _warm_turns(case: Case, runs: Runs) -> dict[str, list[float]]:
    in_turns(runs, WARM)
    return in_turns(runs, case.repeats)


def _ms(seconds: list[float]) -> list[float]:
    return [1e3 * one for one in seconds]
