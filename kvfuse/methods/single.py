"""One model answers alone: the receiver, or the sharer."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kvfuse.language_model import LanguageModel
from kvfuse.methods.base import Method, OptionScore, Reply, to_replies
from kvfuse.methods.scoring import OptionBatch
from kvfuse.prompts.alignment import AlignedPrompt, from_ids, pad_left
from kvfuse.prompts.chat import Prompt
from kvfuse.prompts.response import Response, tokenize_continuation
from kvfuse.prompts.tokenized import TokenizedPrompt, tokenize
from kvfuse.stages.decode import decode, stream
from kvfuse.stages.prefill import prefill


class Single(Method):
    """A model on its own.

    Args:
        name: ``receiver`` or ``sharer``.
        model: The model.
    """

    def __init__(self, name: str, model: LanguageModel) -> None:
        self.name, self.model = name, model

    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """See :class:`Method`."""
        prompt, readings = self._read(prompts)
        ids = self._answer(prompt, readings[0].pad_id, **options)
        return to_replies(ids[:, prompt.ids.shape[1] :], self.model, [len(reading.ids) for reading in readings])

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """See :class:`Method`."""
        batch, readings = self._read([prompt])
        pad_id = readings[0].pad_id
        return stream(self.model.tokenizer, lambda streamer: self._answer(batch, pad_id, streamer=streamer, **options))

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """See :class:`Method`."""
        prompt, readings = self._read(prompts)
        tokenizer = self.model.tokenizer
        follow = [
            [Response(tokenize_continuation(reading, text, tokenizer)[0]) for text in some]
            for reading, some in zip(readings, options, strict=True)
        ]
        batch, cache = OptionBatch.of(prompt, follow), None
        if prompt.ids.shape[1] > 1:
            cache = prefill(self.model.model, prompt.ids[:, :-1], prompt.mask[:, :-1], prompt.positions[:, :-1])
            cache.reorder_cache(batch.rows.to(self.model.model.device))
        return batch.score(self.model.model, cache)

    def _read(self, prompts: Sequence[Prompt]) -> tuple[AlignedPrompt, list[TokenizedPrompt]]:
        readings = [tokenize(prompt, self.model.tokenizer) for prompt in prompts]
        ids, mask = pad_left([reading.ids for reading in readings], readings[0].pad_id)
        return from_ids(ids, num_sharers=0, mask=mask), readings

    def _answer(self, prompt: AlignedPrompt, pad_id: int, **options: Any) -> Any:
        return decode(
            self.model.model,
            prompt.ids,
            prompt.mask,
            None,
            phase=f"{self.name}_prefill",
            pad_token_id=pad_id,
            **options,
        )
