"""Responses behind their prompts: what each model reads of one, and a batch of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvfuse.prompts.alignment import AlignedPrompt, AlignedRow, SharerPrompt, pad_left
from kvfuse.prompts.chat_options import response_cuts
from kvfuse.prompts.ends import end_id
from kvfuse.prompts.reencode import reencoding
from kvfuse.prompts.tokenized import TokenizedPrompt, encode_cut


@dataclass(frozen=True)
class Response:
    """One response as the models read it.

    Attributes:
        ids: ``(R,)`` int64, the receiver's.
        sharers: Where responses are fused too, per sharer its ids ``(R_s,)``, and for the last prompt token and each
            response token the number of these that it may see ``(1 + R,)``: those that reveal no more text.
    """

    ids: np.ndarray
    sharers: tuple[tuple[np.ndarray, np.ndarray], ...] = ()


def tokenize_response(
    prompt: AlignedRow,
    text: str,
    receiver: PreTrainedTokenizerBase,
    sharers: Sequence[tuple[PreTrainedTokenizerBase, str]] = (),
    ends: bool = False,
) -> Response:
    """Tokenize a response for every model that reads it.

    Args:
        prompt: The prompt before it.
        text: The response.
        receiver: The receiver's tokenizer.
        sharers: Where responses are fused too, each sharer's tokenizer and alignment
            (:func:`kvfuse.prompts.alignment.align`).
        ends: Append the token that ends a response, if the receiver has one (:func:`kvfuse.prompts.ends.end_id`).
    """
    ids, reached = tokenize_continuation(prompt.receiver, text, receiver)
    end = end_id(receiver, templated=prompt.receiver.prompt.templated) if ends else None
    if end is not None:
        ids, reached = np.append(ids, end), np.append(reached, len(text))
    read = []
    for (tokenized, _), (tokenizer, alignment) in zip(prompt.sharers, sharers, strict=False):  # no sharers: not fused
        visible = np.arange(1 + len(ids))
        if alignment == "identity":
            sharer_ids = ids
        elif alignment == "span":
            sharer_ids, sharer_reached = tokenize_continuation(tokenized, text, tokenizer)
            visible = np.searchsorted(sharer_reached, np.append(0, reached), side="right")
        else:
            sharer_ids = reencoding(receiver=receiver, sharer=tokenizer, strategy=alignment)[ids]
        read.append((sharer_ids, visible))
    return Response(ids, tuple(read))


def tokenize_continuation(
    prompt: TokenizedPrompt, text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize a text as it follows a prompt; separately, where a token would span both.

    Returns:
        Ids ``(n,)`` int64, and the number of characters of the text up to the end of each ``(n,)`` int64.
    """
    length, origin = len(prompt.ids), len(prompt.prompt.text)
    special = not prompt.prompt.templated
    whole = prompt.prompt.text + text
    cuts = prompt.cuts + response_cuts(whole, origin, tokenizer)
    ids, offsets = encode_cut(whole, tokenizer, cuts, add_special_tokens=special)
    if ids[:length] != prompt.ids.tolist():
        cuts, length, origin = response_cuts(text, 0, tokenizer), 0, 0
        ids, offsets = encode_cut(text, tokenizer, cuts, add_special_tokens=False)
    starts, ends = np.array(offsets[length:], dtype=np.int64).reshape(-1, 2).T - origin
    ends[:-1] = np.minimum(ends[:-1], starts[1:])  # only the last piece of a character completes it
    return np.array(ids[length:], dtype=np.int64), ends


def stack_responses(prompt: AlignedPrompt, responses: Sequence[Response]) -> AlignedPrompt:
    """Pad responses on the right, so that one column separates all prompts from them.

    Args:
        prompt: The prompts, padded left.
        responses: One per row.

    Returns:
        ``(B, 1 + R)``: the last prompt token, then the response. Where responses are fused too, each sharer's last
        prompt token and its tokens of the response ``(B, 1 + R_s)``.
    """
    ids, mask, positions = _append(prompt, [response.ids for response in responses])
    sharers = []
    for before, rows in zip(
        prompt.sharers, zip(*(response.sharers for response in responses), strict=True), strict=False
    ):
        sharer_ids, visible = zip(*rows, strict=True)
        tail_ids, tail_mask, tail_positions = _append(before, sharer_ids)
        index, _ = _pad_right(visible, -1)
        sharers.append(SharerPrompt(ids=tail_ids, mask=tail_mask, positions=tail_positions, index=index))
    return AlignedPrompt(ids=ids, mask=mask, positions=positions, sharers=tuple(sharers), fuse_mask=mask.bool())


def _append(prompt: AlignedPrompt | SharerPrompt, rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions ``(B, 1 + R)`` of a batch from the last prompt token on."""
    last = prompt.ids[:, -1:].numpy()  # (B, 1)
    ids, mask = _pad_right([np.append(token, row) for token, row in zip(last, rows, strict=True)], 0)
    return ids, mask, prompt.positions[:, -1:] + torch.arange(ids.shape[1])


def _pad_right(rows: Sequence[np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    ids, mask = pad_left([row[::-1] for row in rows], fill)
    return ids.flip(1), mask.flip(1)
