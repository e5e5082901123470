"""Encoded examples -> labelled, padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvfuse.cache.kv import KV
from kvfuse.prompts.alignment import AlignedPrompt, stack
from kvfuse.prompts.response import stack_responses
from kvfuse.training.data.columns import EncodedExample

IGNORED = -100  # the label that transformers' losses skip


@dataclass(frozen=True)
class Kept:
    """Keys and values of a batch's prompts, padded left, in place of what reading them gives.

    Attributes:
        receiver: ``(L_r, B, H_r, T - 1, D_r)``, or None where the receiver reads by itself.
        sharers: ``(L_s, B, H_s, T_s, D_s)`` each.
    """

    receiver: KV | None
    sharers: tuple[KV, ...]


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """A padded batch: prompts padded left, what follows padded right, so that one column parts the two everywhere.

    Attributes:
        prompt: The prompts, their last token included.
        tail: ``(B, 1 + R)``: the last prompt token, then the response (:func:`kvfuse.prompts.response.stack_responses`).
        labels: ``(B, 1 + R)`` int64, :data:`IGNORED` on the prompt's token and on padding.
        kept: What the models have read of the prompts already.
    """

    prompt: AlignedPrompt
    tail: AlignedPrompt
    labels: Tensor
    kept: Kept | None = None


def collate(examples: Sequence[EncodedExample], kept: Kept | None = None) -> TrainingBatch:
    """Pad encoded examples into a batch."""
    prompt = stack([example.prompt for example in examples])
    tail = stack_responses(prompt, [example.response for example in examples])
    labels = tail.ids.masked_fill(tail.mask == 0, IGNORED)
    labels[:, 0] = IGNORED
    return TrainingBatch(prompt=prompt, tail=tail, labels=labels, kept=kept)
