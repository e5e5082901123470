"""The plans: which cases are measured, and which groups of figures of each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from benchmarks.asking import end_to_end_rows, first_token_rows, generate, greedy
from benchmarks.case import Case
from benchmarks.decoding import decode_rows
from benchmarks.fusing import fuse_rows, growth_rows
from benchmarks.gpu import gpu_first_token_rows, gpu_folded_rows, gpu_fuse_rows, static_rows
from benchmarks.machine import Machine, grouped_weights
from benchmarks.memory import memory_rows
from benchmarks.pairs import prompt_for, random_pair
from benchmarks.rows import Row
from benchmarks.training import random_step, step_rows
from kvfuse.demo import load_pair
from kvfuse.model import CacheToCache

Group = Callable[[Case], Iterator[Row]]


def training_rows(case: Case) -> Iterator[Row]:
    """A training step of 512 tokens per example, whatever the case; it updates the fuser."""
    step = random_step(case.pair, case.batch)
    yield from step_rows(step, f"{case.shapes}, batch {case.batch}, training", case.repeats)
    case.pair.fusers[0].eval().requires_grad_(False)


@dataclass(frozen=True)
class Planned:
    """Groups of figures of one case, and the number of rounds."""

    shapes: str
    batch: int
    tokens: int
    repeats: int
    groups: tuple[Group, ...] = (first_token_rows,)


QUICK = (
    Planned("embedded", 1, 64, 5),
    Planned("mid", 1, 256, 3),
    Planned("mid", 1, 512, 1, (training_rows,)),
    Planned("true", 1, 256, 6, (decode_rows,)),
    Planned("true", 1, 256, 2, (fuse_rows, first_token_rows)),
    Planned("true", 1, 256, 1, (end_to_end_rows, memory_rows)),
    Planned("true", 1, 4096, 1, (growth_rows,)),
)
FULL = (
    *(Planned("embedded", batch, 64, 9, (first_token_rows, decode_rows)) for batch in (1, 8)),
    *(Planned("mid", batch, tokens, 3) for batch in (1, 8) for tokens in (64, 256)),
    *(Planned("mid", 1, tokens, repeats) for tokens, repeats in ((1024, 3), (4096, 1))),
    Planned("mid", 8, 1024, 1),
    Planned("mid", 1, 256, 5, (fuse_rows, decode_rows, end_to_end_rows, memory_rows)),
    Planned("mid", 1, 512, 5, (training_rows,)),
    *(Planned("true", 1, tokens, repeats) for tokens, repeats in ((64, 3), (256, 5), (1024, 2), (4096, 1))),
    Planned("true", 8, 64, 1),
    Planned("true", 1, 256, 5, (fuse_rows, decode_rows)),
    *(Planned("true", 1, tokens, 2, (end_to_end_rows,)) for tokens in (64, 256)),
    Planned("true", 1, 1024, 3, (decode_rows,)),
    *(Planned("true", 1, tokens, 1, (memory_rows,)) for tokens in (256, 1024, 4096)),
    Planned("true", 1, 4096, 2, (growth_rows,)),
)
GPU_PROMPTS = ((1, 256), (1, 64), (1, 1024), (1, 4096), (8, 256))
GPU = (
    Planned("true", 1, 256, 20, (gpu_fuse_rows,)),
    *(Planned("true", batch, tokens, 20, (gpu_first_token_rows,)) for batch, tokens in GPU_PROMPTS),
    Planned("true", 1, 1024, 20, (gpu_fuse_rows,)),
    Planned("true", 1, 256, 3, (end_to_end_rows,)),
    Planned("true", 1, 256, 5, (static_rows,)),
    Planned("true", 1, 256, 20, (gpu_folded_rows,)),  # last: the fuser stays folded
)


def build_pair(shapes: str, device: str = "cpu") -> CacheToCache:
    """Returns the embedded pair, or random weights: float32 on a CPU, else bfloat16."""
    if shapes == "embedded":
        return load_pair()
    return random_pair(shapes, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)


def measure(plan: Sequence[Planned], build: Callable[[str], CacheToCache] = build_pair) -> Iterator[Row]:
    """Yields every row of a plan; one pair is in memory at a time."""
    machine: Machine | None = None
    for shapes, cases in groupby(plan, lambda planned: planned.shapes):
        pair = build(shapes)
        # peak speeds once per run, in the dtype of the fuser
        if machine is None:
            weight = grouped_weights(pair.fusers[0])[0]
            machine = Machine.measured(weight)
            yield from machine.rows(f"{weight.device.type}, {str(weight.dtype).removeprefix('torch.')}")
        _warm_up(pair)
        for planned in cases:
            case = Case(shapes, pair, planned.batch, planned.tokens, planned.repeats, machine)
            for group in planned.groups:
                yield from group(case)
        del pair, case  # before the next one is built


@torch.no_grad()
def _warm_up(pair: CacheToCache) -> None:
    """A short answer each way, so that imports and set-up are not timed."""
    prompt = prompt_for(pair, 1, 16)
    pair.answer(prompt, **greedy(2))
    generate(pair.receiver, prompt.ids, 2)
