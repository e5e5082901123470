"""Encoded examples -> labelled, padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvfuse.kv_cache import KV
from kvfuse.token_alignment import AlignedPrompt, SharerPrompt, pad_left, stack
from kvfuse.training.columns import EncodedExample

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
        tail: ``(B, 1 + R)``: the last prompt token, then the response. Where the response is fused too, each sharer's last
            prompt token and its reading of the response ``(B, 1 + R_s)``.
        labels: ``(B, 1 + R)`` int64, :data:`IGNORED` on the prompt's token and on padding.
        kept: What the models have read of the prompts already.
    """

    prompt: AlignedPrompt
    tail: AlignedPrompt
    labels: Tensor
    kept: Kept | None = None


def collate(examples: Sequence[EncodedExample], kept: Kept | None = None) -> TrainingBatch:
    """Pad encoded examples into a batch."""
    ids, mask = _pad_right([np.concatenate([example.prompt.receiver.ids[-1:], example.response_ids]) for example in examples], 0)
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, 0] = IGNORED
    prompt = stack([example.prompt for example in examples])
    sharers = tuple(_collate_sharer(examples, place, prompt.sharers[place]) for place in range(len(examples[0].sharers)))
    tail = AlignedPrompt(ids=ids, mask=mask, positions=_go_on(prompt, ids), sharers=sharers, fuse_mask=mask.bool())
    return TrainingBatch(prompt=prompt, tail=tail, labels=labels, kept=kept)


def _go_on(prompt: AlignedPrompt | SharerPrompt, ids: Tensor) -> Tensor:
    """Positions ``(B, k)`` from the last prompt token on."""
    return prompt.positions[:, -1:] + torch.arange(ids.shape[1])


def _collate_sharer(examples: Sequence[EncodedExample], place: int, prompt: SharerPrompt) -> SharerPrompt:
    readings = [example.prompt.sharers[place][0] for example in examples]
    responses, indices = zip(*(example.sharers[place] for example in examples), strict=True)
    ids, mask = _pad_right([np.append(reading.ids[-1:], response) for reading, response in zip(readings, responses, strict=True)], 0)
    return SharerPrompt(ids=ids, mask=mask, positions=_go_on(prompt, ids), index=_pad_right(indices, -1)[0])


def _pad_right(rows: Sequence[np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    ids, mask = pad_left([row[::-1] for row in rows], fill)
    return ids.flip(1), mask.flip(1)
