"""Encoded examples -> labelled, padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvfuse.cache.kv import KV
from kvfuse.prompts.alignment import AlignedPrompt, stack
from kvfuse.prompts.response import stack_responses
from kvfuse.stages.response_fusion import TailKV
from kvfuse.training.data.columns import EncodedExample

IGNORED = -100  # the label that transformers' losses skip


@dataclass(frozen=True)
class PromptKV:
    """Precomputed keys and values of a batch's prompts, padded left.

    Attributes:
        receiver: ``(L_r, B, H_r, T - 1, D_r)``, or None where the receiver reads the prompts itself.
        sharers: ``(L_s, B, H_s, T_s, D_s)`` each.
        tail: Those of the responses, where they are fused too.
    """

    receiver: KV | None
    sharers: tuple[KV, ...]
    tail: TailKV | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """A batch with prompts padded left and responses padded right, so that all responses begin in one column.

    Attributes:
        prompt: The prompts, their last token included.
        tail: ``(B, 1 + R)``: the last prompt token and the response (:func:`kvfuse.prompts.response.stack_responses`).
        labels: ``(B, 1 + R)`` int64, :data:`IGNORED` on the prompt's token and on padding.
        prompt_kv: The models' caches of the prompts, where they are precomputed.
    """

    prompt: AlignedPrompt
    tail: AlignedPrompt
    labels: Tensor
    prompt_kv: PromptKV | None = None


def collate(examples: Sequence[EncodedExample], prompt_kv: PromptKV | None = None) -> TrainingBatch:
    """Pad encoded examples into a batch."""
    prompt = stack([example.prompt for example in examples])
    # The tail begins with the prompt's last token, which predicts the response's first and is no label itself
    tail = stack_responses(prompt, [example.response for example in examples])
    labels = tail.ids.masked_fill(tail.mask == 0, IGNORED)
    labels[:, 0] = IGNORED
    return TrainingBatch(prompt=prompt, tail=tail, labels=labels, prompt_kv=prompt_kv)
