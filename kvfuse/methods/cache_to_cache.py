"""The receiver answers from a fused cache; and the controls that tell what the sharer's cache contributes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from kvfuse.chat import Prompt
from kvfuse.fusers import Fuser
from kvfuse.kv_cache import KV
from kvfuse.methods.contract import Method, Reply, to_replies
from kvfuse.model import CacheToCache
from kvfuse.token_alignment import AlignedReading, stack


class Fused(Method):
    """Cache-to-Cache."""

    name = "cache-to-cache"

    def __init__(self, pair: CacheToCache) -> None:
        self.pair = pair

    @torch.no_grad()
    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """See :class:`Method`."""
        prompt = stack([self.align(prompt) for prompt in prompts])
        ids = self.pair.answer(prompt, self.fusers, **options)
        return to_replies(ids[:, prompt.ids.shape[1] :], self.pair.receiver)

    def align(self, prompt: Prompt) -> AlignedReading:
        """What every model reads."""
        return self.pair.align(prompt)

    @property
    def fusers(self) -> Sequence[nn.Module]:
        """What fuses."""
        return self.pair.fusers


class Zeroed(Fused):
    """Control: the fusers see zeros in place of every sharer's cache."""

    name = "zeroed"

    @property
    def fusers(self) -> Sequence[nn.Module]:
        """The pair's own, blindfolded."""
        return [_ZeroedSharer(fuser) for fuser in self.pair.fusers]


class Mismatched(Fused):
    """Control: the sharers read another question than the receiver.

    Args:
        pair: The models.
        donor: Gives for each prompt the one that the sharers read instead.
    """

    name = "mismatched"

    def __init__(self, pair: CacheToCache, donor: Callable[[Prompt], Prompt]) -> None:
        super().__init__(pair)
        self.donor = donor

    def align(self, prompt: Prompt) -> AlignedReading:
        """The prompt for the receiver, its donor for the sharers, aligned from the end, where the answer begins."""
        return swap_sharers(self.pair.align(prompt), self.pair.align(self.donor(prompt)))


def swap_sharers(mine: AlignedReading, theirs: AlignedReading) -> AlignedReading:
    """One prompt as the receiver reads it, with what the sharers read of another, aligned from the end."""
    shift = len(theirs.receiver.ids) - len(mine.receiver.ids)
    places = np.maximum(np.arange(len(mine.receiver.ids)) + shift, 0)
    return replace(mine, sharers=tuple((reading, index[places]) for reading, index in theirs.sharers))


class _ZeroedSharer(nn.Module):
    def __init__(self, fuser: Fuser) -> None:
        super().__init__()
        self.fuser = fuser

    def forward(self, receiver: KV, sharer: KV) -> KV:
        return self.fuser(receiver, sharer.zeros_like())
