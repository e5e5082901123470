"""Cache-to-Cache: the receiver answers from a fused cache."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from kvfuse.methods.base import Method, OptionScore, Reply, to_replies
from kvfuse.methods.scoring import OptionBatch
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt, AlignedRow, stack
from kvfuse.prompts.messages import Prompt
from kvfuse.prompts.response import tokenize_response
from kvfuse.stages.decode import stream
from kvfuse.stages.response_fusion import FusedPrompt


class Fused(Method):
    """Cache-to-Cache. A control overrides :meth:`align`, what the models read, :attr:`fusers` or :meth:`fuse`.

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
        output = self.pair.answer(batch, fuse=partial(self.fuse, prompts), **options)
        return to_replies(output, batch, self.pair.receiver)

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """See :class:`Method`."""
        batch, tokenizer = stack([self.align(prompt)]), self.pair.receiver.tokenizer
        answer = partial(self.pair.answer, batch, fuse=partial(self.fuse, [prompt]), **options)
        return stream(tokenizer, lambda streamer: answer(streamer=streamer))

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """See :class:`Method`."""
        rows = [self.align(prompt) for prompt in prompts]
        batch = self.option_batch(rows, options)
        # 1) Every prompt is read and fused once, and its cache repeated for the options.
        fused = self.fuse(prompts, stack(rows))
        fused.repeat(batch.rows)
        # 2) Where responses are fused, all models read the options too.
        fused.stage(batch.tail)
        return batch.score(self.pair.receiver.model, fused.cache)

    def fuse(self, prompts: Sequence[Prompt], batch: AlignedPrompt, max_cache_len: int | None = None) -> FusedPrompt:
        """The fused cache of a batch.

        Args:
            prompts: The batch before it was aligned.
            batch: What :meth:`align` made of them.
            max_cache_len: See :meth:`kvfuse.CacheToCache.fuse`.
        """
        return self.pair.fuse(batch, fusers=self.fusers, max_cache_len=max_cache_len)

    def option_batch(self, rows: Sequence[AlignedRow], options: Sequence[Sequence[str]]) -> OptionBatch:
        """The options of each prompt, as all models that read responses read them."""
        receiver, sharers = self.pair.receiver.tokenizer, self._response_readers()
        responses = [
            [tokenize_response(row, text, receiver, sharers) for text in texts]
            for row, texts in zip(rows, options, strict=True)
        ]
        return OptionBatch.of(stack(rows), responses)

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
