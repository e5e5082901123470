"""Controls, which tell what the sharer's cache contributes: each is Cache-to-Cache with one thing taken away."""

import copy
import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from kvfuse.cache.kv import KV
from kvfuse.errors import MethodError
from kvfuse.fusers import Fuser
from kvfuse.methods.cache_to_cache import Fused
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedRow
from kvfuse.prompts.chat import Prompt

FIRST_DRAW = 2**20  # so that no seed of training gives the weights that it began with


class Zeroed(Fused):
    """The fusers see zeros in place of every sharer's cache."""

    name = "zeroed"

    @property
    def fusers(self) -> Sequence[nn.Module]:
        """The pair's own, blindfolded."""
        return [_ZeroedSharer(fuser) for fuser in self.pair.fusers]


class Mismatched(Fused):
    """The sharers read another question than the receiver.

    Args:
        pair: The models.
        donor: Gives for each prompt the one that the sharers read instead; by default some other one of the run.
    """

    name = "mismatched"

    def __init__(self, pair: CacheToCache, donor: Callable[[Prompt], Prompt] | None = None) -> None:
        super().__init__(pair)
        self.donor = donor or self._next
        self._donors: dict[str, Prompt] = {}

    def prepare(self, prompts: Sequence[Prompt], **options: Any) -> None:
        """Let each prompt's donor be another of like length: the next by length, in a random order where lengths are the same.

        So the two are mostly of one kind, and what a sharer of another kind of question would spoil does not count as content.
        Neighbours in the run would often be about the same thing.
        """
        unlike = {_key(prompt): prompt for prompt in prompts}
        order = sorted(random.Random(0).sample(sorted(unlike), len(unlike)), key=len)
        self._donors = (
            {one: unlike[other] for one, other in zip(order, [*order[1:], *order[:1]], strict=True)}
            if len(order) > 1
            else {}
        )

    def align(self, prompt: Prompt) -> AlignedRow:
        """The prompt for the receiver, its donor for the sharers, aligned from the end, where the answer begins."""
        return swap_sharers(self.pair.align(prompt), self.pair.align(self.donor(prompt)))

    def _next(self, prompt: Prompt) -> Prompt:
        if _key(prompt) not in self._donors:
            raise MethodError(
                "expected a prompt of a run that has others too, got one without a donor; call prepare with two or more"
            )
        return self._donors[_key(prompt)]


class Shuffled(Fused):
    """Each receiver position reads another position of the sharer's prompt than its own.

    Args:
        pair: The models.
        seed: Of the order, which depends on the prompt alone beside it.
    """

    name = "shuffled"

    def __init__(self, pair: CacheToCache, seed: int = 0) -> None:
        super().__init__(pair)
        self.seed = seed

    def align(self, prompt: Prompt) -> AlignedRow:
        """The prompt, the sharers' positions interchanged."""
        aligned = self.pair.align(prompt)
        rng = np.random.default_rng([self.seed, zlib.crc32(aligned.receiver.ids.tobytes())])
        sharers = tuple((theirs, _interchange(index, len(theirs.ids), rng)) for theirs, index in aligned.sharers)
        return replace(aligned, sharers=sharers)


class RandomFuser(Fused):
    """Fusers of the same configuration, their weights freshly drawn, their gates as they were trained.

    Args:
        pair: The models.
        seed: Of the weights.
    """

    name = "random-fuser"

    def __init__(self, pair: CacheToCache, seed: int = 0) -> None:
        super().__init__(pair)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(FIRST_DRAW + seed)
            self._drawn = [_draw(fuser) for fuser in pair.fusers]

    @property
    def fusers(self) -> Sequence[nn.Module]:
        """The random ones."""
        return self._drawn


class ProjectedOnly(Fused):
    """What the fusers make of the sharers' caches stands in place of the receiver's own (paper, table 8, without retraining)."""

    name = "projected-only"

    @property
    def fusers(self) -> Sequence[nn.Module]:
        """The pair's own; the first takes the receiver's cache away, to which the residuals are added."""
        first, *others = self.pair.fusers
        return [_WithoutReceiver(first), *others]


def swap_sharers(mine: AlignedRow, theirs: AlignedRow) -> AlignedRow:
    """One prompt as the receiver reads it, with what the sharers read of another, aligned from the end."""
    shift = len(theirs.receiver.ids) - len(mine.receiver.ids)
    places = np.maximum(np.arange(len(mine.receiver.ids)) + shift, 0)
    return replace(mine, sharers=tuple((reading, index[places]) for reading, index in theirs.sharers))


class _ZeroedSharer(nn.Module):
    def __init__(self, fuser: Fuser) -> None:
        super().__init__()
        self.fuser = fuser

    def forward(self, receiver: KV, sharer: KV) -> KV:
        return self.fuser(receiver=receiver, sharer=sharer.zeros_like())


class _WithoutReceiver(nn.Module):
    def __init__(self, fuser: Fuser) -> None:
        super().__init__()
        self.fuser = fuser

    def forward(self, receiver: KV, sharer: KV) -> KV:
        residual = self.fuser(receiver=receiver, sharer=sharer)
        return KV(residual.key - receiver.key, residual.value - receiver.value)


def _interchange(index: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """An index into ``length`` positions that reads each in another's place: they move along one random circle."""
    circle = rng.permutation(length)
    other = np.empty(length, dtype=np.int64)
    other[circle] = np.roll(circle, 1)
    return np.where(index >= 0, other[index], -1)


def _draw(fuser: Fuser) -> Fuser:
    config = copy.deepcopy(fuser.config)
    if hasattr(config, "zero_init"):  # a residual of zero would be no fuser at all
        config.zero_init = False
    drawn = type(fuser)(config)
    drawn.reset_parameters()
    drawn.to(fuser.device, fuser.dtype).eval()
    for gate, trained in zip(drawn.gate_parameters(), fuser.gate_parameters(), strict=True):
        gate.data.copy_(trained.data)
    return drawn


def _key(prompt: Prompt) -> str:
    return json.dumps(prompt, sort_keys=True, default=str)
