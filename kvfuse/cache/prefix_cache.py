"""Caches of prompts, by who made them, kept for prompts that begin alike; within a budget, of which the least recently used ones leave."""

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count
from threading import Lock

import torch
from torch import Tensor

from kvfuse.cache.transformers_cache import Layers, copy_layers
from kvfuse.prompts.alignment import AlignedPrompt

USEFUL = 16  # tokens; to read fewer takes no longer than to look for them


@dataclass(frozen=True)
class Text:
    """All that a cache of one prompt depends on, beside who made it.

    Attributes:
        own: ``(k, T)`` int64: ids and positions; of a fused cache also whether each is fused.
        sharers: Of a fused cache, what each sharer read, ``(2, T_s)`` int64, and which of it each position reads, ``(T,)`` int64.
    """

    own: Tensor
    sharers: tuple[tuple[Tensor, Tensor], ...] = ()

    def __len__(self) -> int:
        return self.own.shape[1]

    def common(self, other: "Text") -> int:
        """At how many first positions a cache of the one holds what a cache of the other does."""
        same = _equal(self.own, other.own)
        for (read, index), (their_read, their_index) in zip(self.sharers, other.sharers, strict=True):
            mine, theirs = index[: len(same)], their_index[: len(same)]
            same = same & (mine == theirs) & (mine < _leading(_equal(read, their_read)))
        return _leading(same)


def exact_text(ids: Tensor, positions: Tensor) -> Text:
    """Of a cache that a model made of ``(1, T)`` ids and positions alone."""
    return Text(torch.stack([ids[0], positions[0]]))


def fused_text(prompt: AlignedPrompt, num_sharers: int) -> Text:
    """Of one prompt's fused cache: all positions but the last, whose sharers count where they are fused."""
    fused = prompt.fuse_mask[0, :-1]
    own = torch.stack([prompt.ids[0, :-1], prompt.positions[0, :-1], fused.long()])
    reads = prompt.sharers[:num_sharers]
    return Text(
        own, tuple((torch.stack([one.ids[0], one.positions[0]]), one.index[0, :-1].where(fused, -1)) for one in reads)
    )


@dataclass(eq=False)
class Entry:
    """Copies of keys and values, which nobody writes to, and when they were last asked for."""

    text: Text
    layers: Layers
    nbytes: int
    used: int


class PrefixCache:
    """Entries by their maker. Threads may share one.

    Args:
        max_bytes: What all copies may take together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._by_maker: dict[Hashable, list[Entry]] = {}
        self._clock, self._lock = count(), Lock()

    def entries(self) -> list[Entry]:
        with self._lock:
            return [entry for some in self._by_maker.values() for entry in some]

    def clear(self) -> None:
        with self._lock:
            self._by_maker.clear()

    def find(self, maker: Hashable, text: Text) -> tuple[Entry | None, int]:
        """The entry that begins as the text for longest, and for how many positions."""
        with self._lock:
            found = [(text.common(entry.text), entry) for entry in self._by_maker.get(maker, ())]
            known, entry = max(found, key=lambda one: one[0], default=(0, None))
            if entry is None or known < min(USEFUL, len(text)):
                return None, 0
            entry.used = next(self._clock)
            return entry, known

    def keep(self, maker: Hashable, text: Text, layers: Layers) -> None:
        """Copy a cache, in place of those of the text's beginnings; one larger than the shelf is not kept."""
        nbytes = sum(part.nbytes for layer in layers for part in layer)
        if nbytes > self.max_bytes:
            return
        copies = copy_layers(layers)
        with self._lock:
            longer = [other for other in self._by_maker.get(maker, ()) if text.common(other.text) < len(other.text)]
            self._by_maker[maker] = [*longer, Entry(text, copies, nbytes, next(self._clock))]
            self._make_room()

    def _make_room(self) -> None:
        entries = sorted(
            ((maker, entry) for maker, some in self._by_maker.items() for entry in some), key=lambda one: one[1].used
        )
        excess = sum(entry.nbytes for _, entry in entries) - self.max_bytes
        for maker, entry in entries:
            if excess <= 0:
                return
            excess -= entry.nbytes
            self._by_maker[maker] = [other for other in self._by_maker[maker] if other is not entry]
            if not self._by_maker[maker]:
                del self._by_maker[maker]


def _equal(mine: Tensor, theirs: Tensor) -> Tensor:
    """Which columns of ``(k, T)`` and ``(k, U)`` are the same, as far as both go: bool."""
    length = min(mine.shape[1], theirs.shape[1])
    return (mine[:, :length] == theirs[:, :length]).all(0)


def _leading(same: Tensor) -> int:
    """How many are true before the first that is not."""
    return int(same.long().cumprod(0).sum())
