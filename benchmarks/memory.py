"""Memory of tensors while something runs, and of a fused prefill next to what it cannot do without."""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.case import Case
from benchmarks.machine import parameter_bytes, token_bytes
from benchmarks.rows import Row


class LiveMemory(TorchDispatchMode):
    """While open, counts the bytes of every storage that an operation makes until it is freed.

    Allocators and the work space of single kernels are not counted; views and older tensors count nothing.

    Attributes:
        peak: The most bytes alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # what comes in is older, also where an operation returns it
        before = {
            tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs or {})) if isinstance(tensor, Tensor)
        }
        # count what is new in the result
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._count(tensor.untyped_storage(), before)
        return result

    def _count(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in before:
            return
        self._known.add(key)
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def peak_bytes(run: Callable[[], Any]) -> int:
    """Returns the most bytes that ``run`` has alive at one time, beyond those from before."""
    with LiveMemory() as memory:
        run()
    return memory.peak


@torch.no_grad()
def memory_rows(case: Case) -> Iterator[Row]:
    """Peak memory of a fused prefill next to models, fuser and caches: of tensors, as :class:`LiveMemory` counts."""
    pair, prompt = case.pair, case.prompt
    static = sum(map(parameter_bytes, (pair.receiver.model, *(sharer.model for sharer in pair.sharers), *pair.fusers)))
    caches = case.fused_tokens * token_bytes(pair.receiver)  # the receiver's leaves the last position out
    for sharer, reads in zip(pair.sharers, prompt.sharers, strict=True):
        caches += reads.ids.numel() * token_bytes(sharer)
    # everything that the prefill allocates, caches included
    made = peak_bytes(partial(pair.prefill, prompt))
    yield case.row("models and fuser", static / 2**20, "MiB")
    yield case.row("caches of a prompt", caches / 2**20, "MiB")
    yield case.row("made by a fused prefill", made / 2**20, "MiB")
    over_parts = (static + made) / (static + caches)
    yield case.row("peak memory of a fused prefill / (models + caches + fuser)", over_parts, "x")
