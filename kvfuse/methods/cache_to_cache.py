"""The receiver answers from a fused cache."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kvfuse.methods.base import Method, OptionScore, Reply, to_replies
from kvfuse.methods.scoring import OptionBatch
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedRow, stack
from kvfuse.prompts.chat import Prompt
from kvfuse.prompts.response import read_response
from kvfuse.stages.decode import stream


class Fused(Method):
    """Cache-to-Cache. A control changes what the models read, :meth:`align`, or what fuses, :attr:`fusers`."""

    name = "cache-to-cache"
    fuses = True

    def __init__(self, pair: CacheToCache) -> None:
        self.pair = pair

    @torch.no_grad()
    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """See :class:`Method`."""
        readings = [self.align(prompt) for prompt in prompts]
        prompt = stack(readings)
        ids = self.pair.answer(prompt, fusers=self.fusers, **options)
        return to_replies(ids[:, prompt.ids.shape[1] :], self.pair.receiver, list(map(_tokens_in, readings)))

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """See :class:`Method`."""
        batch = stack([self.align(prompt)])
        return stream(
            self.pair.receiver.tokenizer,
            lambda streamer: self.pair.answer(batch, fusers=self.fusers, streamer=streamer, **options),
        )

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """See :class:`Method`."""
        readings = [self.align(prompt) for prompt in prompts]
        receiver, sharers = self.pair.receiver.tokenizer, self._followed_by()
        follow = [
            [read_response(one, text, receiver, sharers) for text in some]
            for one, some in zip(readings, options, strict=True)
        ]
        prompt = stack(readings)
        batch = OptionBatch.of(prompt, follow)
        fused = self.pair.fuse(prompt, fusers=self.fusers)
        fused.repeat(batch.rows)
        fused.stage(batch.tail)
        return batch.score(self.pair.receiver.model, fused.cache)

    def align(self, prompt: Prompt) -> AlignedRow:
        """What every model reads."""
        return self.pair.align(prompt)

    @property
    def fusers(self) -> Sequence[nn.Module]:
        """What fuses."""
        return self.pair.fusers

    def _followed_by(self) -> list[tuple[Any, str]]:
        """The tokenizers of the sharers that read responses, and how they are aligned."""
        sharers = zip(self.pair.sharers, self.pair.fusers, strict=True)
        return [
            (sharer.tokenizer, fuser.config.token_alignment) for sharer, fuser in sharers if self.pair.fuse_response
        ]


def _tokens_in(reading: AlignedRow) -> int:
    return len(reading.receiver.ids) + sum(len(theirs.ids) for theirs, _ in reading.sharers)
