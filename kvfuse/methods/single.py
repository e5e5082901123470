"""One model answers alone: the receiver, or the sharer."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kvfuse.backends.offloading import input_device
from kvfuse.language_model import LanguageModel
from kvfuse.methods.base import Method, OptionScore, Reply, to_replies
from kvfuse.methods.scoring import OptionBatch
from kvfuse.prompts.alignment import AlignedPrompt, from_ids, pad_left
from kvfuse.prompts.messages import Prompt
from kvfuse.prompts.response import Response, tokenize_continuation
from kvfuse.prompts.tokenized import TokenizedPrompt, tokenize
from kvfuse.stages.decode import decode, stream
from kvfuse.stages.generate_options import require_options, token_options
from kvfuse.stages.prefill import prefill


class Single(Method):
    """One model.

    Args:
        name: ``receiver`` or ``sharer``.
        model: The model.
    """

    def __init__(self, name: str, model: LanguageModel) -> None:
        self.name, self.model = name, model

    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """See :class:`Method`."""
        batch = self.batch(self.tokenize(prompts))
        return to_replies(self.decode(batch, **options), batch, self.model)

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """See :class:`Method`."""
        batch = self.batch(self.tokenize([prompt]))
        return stream(self.model.tokenizer, lambda streamer: self.decode(batch, streamer=streamer, **options))

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """See :class:`Method`."""
        model, tokenizer = self.model.model, self.model.tokenizer
        # 1) tokenize the prompts, and the options as they follow them
        tokenized = self.tokenize(prompts)
        prompt = self.batch(tokenized)
        responses = [
            [Response(tokenize_continuation(row, text, tokenizer)[0]) for text in texts]
            for row, texts in zip(tokenized, options, strict=True)
        ]
        batch, cache = OptionBatch.of(prompt, responses), None
        # 2) read each prompt once, up to its last token, and repeat its cache for the options
        if prompt.ids.shape[1] > 1:
            cache = prefill(model, prompt.ids[:, :-1], prompt.mask[:, :-1], prompt.positions[:, :-1])
            cache.reorder_cache(batch.rows.to(input_device(model)))
        # 3) read the last token and the options over the cache
        return batch.score(model, cache)

    def tokenize(self, prompts: Sequence[Prompt]) -> list[TokenizedPrompt]:
        """The prompts as the model's tokens."""
        return [tokenize(prompt, self.model.tokenizer) for prompt in prompts]

    def batch(self, tokenized: Sequence[TokenizedPrompt]) -> AlignedPrompt:
        """The same padded left, ``(B, T)``, without sharers."""
        ids, mask = pad_left([row.ids for row in tokenized], tokenized[0].pad_id)
        return from_ids(ids, num_sharers=0, mask=mask)

    def decode(self, prompt: AlignedPrompt, **options: Any) -> Any:
        """Result of transformers' ``generate``; reading the prompt is timed as the phase ``<name>_prefill``."""
        require_options(self.model.model, options)
        options = token_options(self.model.model, self.model.tokenizer, options)
        return decode(self.model.model, prompt.ids, prompt.mask, None, phase=f"{self.name}_prefill", **options)
