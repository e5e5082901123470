"""Cache-to-Cache: the receiver answers from a fused cache."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache

from kvfuse.cache.transformers_cache import stage
from kvfuse.methods.base import Method, OptionScore, Reply, to_replies
from kvfuse.methods.scoring import OptionBatch
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt, AlignedRow, stack
from kvfuse.prompts.chat import Prompt
from kvfuse.prompts.response import read_response
from kvfuse.stages.decode import stream


class Fused(Method):
    """Cache-to-Cache. A control overrides :meth:`align`, what the models read, or :attr:`fusers`.

    Args:
        pair: The models and fusers.
    """

    name = "cache-to-cache"
    fuses = True

    def __init__(self, pair: CacheToCache) -> None:
        self.pair = pair

    @torch.no_grad()
    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """See :class:`Method`."""
        batch = stack([self.align(prompt) for prompt in prompts])
        return to_replies(self.pair.answer(batch, self.fusers, **options), batch, self.pair.receiver)

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """See :class:`Method`."""
        batch, tokenizer = stack([self.align(prompt)]), self.pair.receiver.tokenizer
        return stream(tokenizer, lambda streamer: self.pair.answer(batch, self.fusers, streamer=streamer, **options))

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """See :class:`Method`."""
        rows = [self.align(prompt) for prompt in prompts]
        receiver, sharers = self.pair.receiver.tokenizer, self._response_readers()
        responses = [
            [read_response(row, text, receiver, sharers) for text in texts]
            for row, texts in zip(rows, options, strict=True)
        ]
        prompt = stack(rows)
        batch = OptionBatch.of(prompt, responses)
        return batch.score(self.pair.receiver.model, self._cache(prompt, batch))

    def align(self, prompt: Prompt) -> AlignedRow:
        """The prompt as every model reads it."""
        return self.pair.align(prompt)

    @property
    def fusers(self) -> Sequence[nn.Module]:
        """The modules that fuse, one per sharer."""
        return self.pair.fusers

    def _response_readers(self) -> list[tuple[Any, str]]:
        """Tokenizer and token alignment of each sharer, where responses are fused too."""
        sharers = zip(self.pair.sharers, self.pair.fusers, strict=True)
        return [
            (sharer.tokenizer, fuser.config.token_alignment) for sharer, fuser in sharers if self.pair.fuse_response
        ]

    def _cache(self, prompt: AlignedPrompt, batch: OptionBatch) -> Cache | None:
        """The fused cache of the prompts, one row per option; None for prompts of one token."""
        if prompt.ids.shape[1] < 2:
            return None
        # 1) every model reads the prompts once, and the receiver's cache is fused
        pair, fusers = self.pair, self.fusers
        caches = pair.read(prompt)
        cache = pair.fuse(prompt, caches, fusers, use_up=not pair.fuse_response)
        # 2) the fused cache is repeated for the options
        cache.reorder_cache(batch.rows.to(pair.receiver.model.device))
        # 3) where responses are fused, all models read the options too; their fused keys and values are staged
        if pair.fuse_response:
            for clean, model in zip((caches.receiver, *caches.sharers), (pair.receiver, *pair.sharers), strict=True):
                clean.reorder_cache(batch.rows.to(model.model.device))
            stage(cache, pair.prefill_response(caches, batch.prompt, batch.tail, fusers))
        return cache
