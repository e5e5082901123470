"""How much memory a fused prefill takes at most, beside what has to be there: both models, the fuser, their caches."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.case import Case
from benchmarks.machine import parameter_bytes, token_bytes
from benchmarks.memory import peak_bytes
from benchmarks.rows import Row


@torch.no_grad()
def footprint_rows(case: Case) -> Iterator[Row]:
    """Tensors alone: what kernels use within a call, and what allocators keep, is not counted."""
    pair = case.pair
    static = sum(map(parameter_bytes, (pair.receiver.model, *(sharer.model for sharer in pair.sharers), *pair.fusers)))
    caches = _cache_bytes(case)
    made = peak_bytes(partial(pair.prefill, case.prompt))
    yield case.row("models and fuser", static / 2**20, "MiB")
    yield case.row("caches of a prompt", caches / 2**20, "MiB")
    yield case.row("made by a fused prefill", made / 2**20, "MiB")
    yield case.row(
        "peak memory of a fused prefill / (models + caches + fuser)", (static + made) / (static + caches), "x"
    )


def _cache_bytes(case: Case) -> int:
    """Of the receiver's cache, which leaves the last position out, and of the sharers'."""
    prompt, sharers = case.prompt, case.pair.sharers
    read = sum(reads.ids.numel() * token_bytes(sharer) for sharer, reads in zip(sharers, prompt.sharers, strict=True))
    return (prompt.ids.numel() - case.batch) * token_bytes(case.pair.receiver) + read
