"""How much memory tensors take while something runs, beyond what was there before."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """While open, counts the bytes of every storage that an operation makes until it is freed.

    Allocators and the work space of single kernels are not counted; views, and what was there before, count nothing.

    Attributes:
        peak: Most bytes that were alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs or {})) if isinstance(tensor, Tensor)
        }
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
    """The most that ``run`` has alive at one time, beyond what was there before."""
    with LiveMemory() as memory:
        run()
    return memory.peak
