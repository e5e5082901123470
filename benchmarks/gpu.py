"""On a GPU, fusing is bound by launches and by waiting for the device rather than by arithmetic, so these are counted."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.asking import generate, greedy
from benchmarks.case import Case
from benchmarks.fusing import fuse_once
from benchmarks.machine import Work
from benchmarks.rows import Row
from benchmarks.timing import in_turns, ratio, timed

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
COPY = "Memcpy DtoH"


@torch.no_grad()
def gpu_rows(case: Case) -> Iterator[Row]:
    """Time of a fuse, its launches and copies, and the first token."""
    pair, prompt = case.pair, case.prompt
    runs = {
        "fuse": partial(fuse_once, case),
        "receiver": partial(timed, generate, pair.receiver, prompt.ids, 1),
        "C2C": partial(timed, pair.answer, prompt, **greedy(1)),
    }
    in_turns(runs, 2)  # kernels are chosen when a shape is first seen
    taken = in_turns(runs, case.repeats)
    least = case.machine.seconds(Work.of_fusing(pair, prompt))
    yield case.timed_row("fuse", [1e3 * seconds for seconds in taken["fuse"]], "ms")
    yield case.timed_row("fuse / roofline", [seconds / least for seconds in taken["fuse"]], "x")
    yield from _count_rows(case)
    for name in ("receiver", "C2C"):
        yield case.timed_row(f"first token, {name}", [1e3 * seconds for seconds in taken[name]], "ms")
    yield case.timed_row("first token / receiver's", ratio(taken["C2C"], taken["receiver"]), "x")


def _count_rows(case: Case) -> Iterator[Row]:
    """What one fuse launches, and how often it brings something back to the host, which waits for it."""
    streams = case.new_streams()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        case.pair.fuse(case.prompt, streams, case.pair.fusers, use_up=True)
        torch.cuda.synchronize()
    names = [event.name for event in seen.events()]
    yield case.row("kernel launches of a fuse", sum(name.startswith(LAUNCHES) for name in names), "launches")
    yield case.row("device-to-host copies of a fuse", sum(COPY in name for name in names), "copies")
