"""Caches of prompts by owner, found again by the longest common prefix; the least recently used ones are evicted."""

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count
from threading import Lock

import torch
from torch import Tensor

from kvfuse.cache.transformers_cache import Layers
from kvfuse.prompts.alignment import AlignedPrompt

MIN_REUSED_TOKENS = 16  # reading fewer takes no longer than looking for them


@dataclass(frozen=True)
class CachedText:
    """Everything that the cache of one prompt depends on, except its owner.

    Attributes:
        own: ``(k, T)`` int64: ids and positions; of a fused cache also whether each position is fused.
        sharers: Of a fused cache, what each sharer read, ``(2, T_s)`` int64, and the index of the sharer position that
            each position reads, ``(T,)`` int64.
    """

    own: Tensor
    sharers: tuple[tuple[Tensor, Tensor], ...] = ()

    def __len__(self) -> int:
        return self.own.shape[1]

    def common_prefix(self, other: "CachedText") -> int:
        """Number of positions at the beginning that caches of the two have in common."""
        same = _equal_columns(self.own, other.own)
        for (read, index), (other_read, other_index) in zip(self.sharers, other.sharers, strict=True):
            index, other_index = index[: len(same)], other_index[: len(same)]
            same = same & (index == other_index) & (index < _count_leading(_equal_columns(read, other_read)))
        return _count_leading(same)


def exact_text(ids: Tensor, positions: Tensor) -> CachedText:
    """The text of a cache that a model computed from ``(1, T)`` ids and positions."""
    return CachedText(torch.stack([ids[0], positions[0]]))


def fused_text(prompt: AlignedPrompt, num_sharers: int) -> CachedText:
    """The text of one prompt's fused cache: all positions but the last; sharers count where they are fused."""
    fused = prompt.fuse_mask[0, :-1]
    own = torch.stack([prompt.ids[0, :-1], prompt.positions[0, :-1], fused.long()])
    sharers = [
        (torch.stack([sharer.ids[0], sharer.positions[0]]), sharer.index[0, :-1].where(fused, -1))
        for sharer in prompt.sharers[:num_sharers]
    ]
    return CachedText(own, tuple(sharers))


@dataclass(eq=False)
class Entry:
    """Copies of keys and values that are never written to, and the time of their last use."""

    text: CachedText
    layers: Layers
    nbytes: int
    used: int


class PrefixCache:
    """Entries by owner. Threads may share one.

    Args:
        max_bytes: Size of all copies together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._by_owner: dict[Hashable, list[Entry]] = {}
        self._clock, self._lock = count(), Lock()

    def entries(self) -> list[Entry]:
        with self._lock:
            return [entry for entries in self._by_owner.values() for entry in entries]

    def clear(self) -> None:
        with self._lock:
            self._by_owner.clear()

    def find(self, owner: Hashable, text: CachedText) -> tuple[Entry | None, int]:
        """The entry with the longest common prefix, and the length of that in positions."""
        with self._lock:
            found = [(text.common_prefix(entry.text), entry) for entry in self._by_owner.get(owner, ())]
            known, entry = max(found, key=lambda pair: pair[0], default=(0, None))
            if entry is None or known < min(MIN_REUSED_TOKENS, len(text)):
                return None, 0
            entry.used = next(self._clock)
            return entry, known

    def put(self, owner: Hashable, text: CachedText, layers: Layers) -> None:
        """Copy a cache; it replaces those of prefixes of its text. One larger than the budget is not kept."""
        nbytes = sum(part.nbytes for layer in layers for part in layer)
        if nbytes > self.max_bytes:
            return
        copies = [(key.clone(), value.clone()) for key, value in layers]  # without the spare capacity behind them
        with self._lock:
            entries = self._by_owner.get(owner, ())
            longer = [entry for entry in entries if text.common_prefix(entry.text) < len(entry.text)]
            self._by_owner[owner] = [*longer, Entry(text, copies, nbytes, next(self._clock))]
            self._evict()

    def _evict(self) -> None:
        """Remove the least recently used entries until the others fit."""
        entries = [(owner, entry) for owner, entries in self._by_owner.items() for entry in entries]
        excess = sum(entry.nbytes for _, entry in entries) - self.max_bytes
        for owner, entry in sorted(entries, key=lambda pair: pair[1].used):
            if excess <= 0:
                return
            excess -= entry.nbytes
            self._by_owner[owner].remove(entry)
            if not self._by_owner[owner]:
                del self._by_owner[owner]


def _equal_columns(first: Tensor, second: Tensor) -> Tensor:
    """Whether columns of ``(k, T)`` and ``(k, U)`` are equal, as far as both go: bool."""
    length = min(first.shape[1], second.shape[1])
    return (first[:, :length] == second[:, :length]).all(0)


def _count_leading(same: Tensor) -> int:
    """Number of true values before the first false one."""
    return int(same.long().cumprod(0).sum())
