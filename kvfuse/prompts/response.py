"""A response as it follows its prompt: what each model reads of it, and a batch of them behind a batch of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvfuse.prompts.alignment import AlignedPrompt, AlignedRow, SharerPrompt, pad_left
from kvfuse.prompts.reencode import reencoding
from kvfuse.prompts.tokenized import TokenizedPrompt


@dataclass(frozen=True)
class Response:
    """One response as the models read it.

    Attributes:
        ids: ``(R,)`` int64, the receiver's.
        sharers: Where the response is fused too, per sharer: what it reads of it ``(R_s,)``, and for the last prompt token
            and each response token how many of these it may see ``(1 + R,)``: those that say no more than has been said.
    """

    ids: np.ndarray
    sharers: tuple[tuple[np.ndarray, np.ndarray], ...] = ()


def read_response(
    prompt: AlignedRow,
    text: str,
    receiver: PreTrainedTokenizerBase,
    sharers: Sequence[tuple[PreTrainedTokenizerBase, str]] = (),
    ends: bool = False,
) -> Response:
    """Tokenize a response for every model that reads it.

    Args:
        prompt: What it follows.
        text: What it says.
        receiver: The receiver's tokenizer.
        sharers: Where the response is fused too, each sharer's tokenizer and how it is aligned (:func:`kvfuse.prompts.alignment.align`).
        ends: Whether an end-of-sequence token stands behind it.
    """
    ids, said = follow_on(prompt.receiver, text, receiver)
    if ends:
        ids, said = np.append(ids, receiver.eos_token_id), np.append(said, len(text))
    theirs = []
    for (reading, _), (tokenizer, how) in zip(prompt.sharers, sharers, strict=False):  # none where it is not fused
        if how == "span":
            their_ids, their_said = follow_on(reading, text, tokenizer)
            theirs.append((their_ids, np.searchsorted(their_said, np.append(0, said), side="right")))
        else:  # token by token
            their_ids = ids if how == "identity" else reencoding(receiver, tokenizer, how)[ids]
            theirs.append((their_ids, np.arange(1 + len(ids))))
    return Response(ids, tuple(theirs))


def follow_on(prompt: TokenizedPrompt, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize a text as it follows a prompt; alone, where the two would grow together.

    Returns:
        Ids ``(n,)`` int64, and how many characters of the text have been said after each ``(n,)`` int64.
    """
    length, origin = len(prompt.ids), len(prompt.prompt.text)
    encoded = tokenizer(
        prompt.prompt.text + text, add_special_tokens=not prompt.prompt.templated, return_offsets_mapping=True
    )
    if encoded.input_ids[:length] != prompt.ids.tolist():
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        length, origin = 0, 0
    starts, ends = np.array(encoded.offset_mapping[length:], dtype=np.int64).reshape(-1, 2).T - origin
    ends[:-1] = np.minimum(ends[:-1], starts[1:])  # all pieces of a character but its last have not said it yet
    return np.array(encoded.input_ids[length:], dtype=np.int64), ends


def stack_responses(prompt: AlignedPrompt, responses: Sequence[Response]) -> AlignedPrompt:
    """Pad responses on the right, so that one column parts all prompts from what follows them.

    Args:
        prompt: As many prompts, padded left.
        responses: One per row.

    Returns:
        ``(B, 1 + R)``: the last prompt token, then the response. Where the response is fused too, each sharer's last prompt
        token and its reading of the response ``(B, 1 + R_s)``.
    """
    ids, mask, positions = _go_on(prompt, [response.ids for response in responses])
    sharers = []
    for place in range(len(responses[0].sharers)):
        theirs, indices = zip(*(response.sharers[place] for response in responses), strict=True)
        read = dict(zip(("ids", "mask", "positions"), _go_on(prompt.sharers[place], theirs), strict=True))
        sharers.append(SharerPrompt(**read, index=_pad_right(indices, -1)[0]))
    return AlignedPrompt(ids=ids, mask=mask, positions=positions, sharers=tuple(sharers), fuse_mask=mask.bool())


def _go_on(prompt: AlignedPrompt | SharerPrompt, rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions ``(B, k)`` of a batch from the last prompt token on."""
    ids, mask = _pad_right(
        [np.append(last, row) for last, row in zip(prompt.ids[:, -1:].numpy(), rows, strict=True)], 0
    )
    return ids, mask, prompt.positions[:, -1:] + torch.arange(ids.shape[1])


def _pad_right(rows: Sequence[np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    ids, mask = pad_left([row[::-1] for row in rows], fill)
    return ids.flip(1), mask.flip(1)
