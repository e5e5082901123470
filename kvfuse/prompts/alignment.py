"""The same prompt as receiver ids and sharer ids; for every receiver position the sharer position that covers it.

```
text        What  is   Oslo ?   <eot> <assistant>
receiver    What  is   Os   lo  ?   <end> <start> assistant \\n
sharer      What  is   Oslo ?   <eot> <assistant>
index       0     1    2    2   3   5     5       5         -      (the last prompt token is never fused)
```
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvfuse.errors import PairError
from kvfuse.prompts.message_axis import locate, message_order
from kvfuse.prompts.messages import Prompt
from kvfuse.prompts.reencode import REENCODINGS, common_positions, reencoding, splice
from kvfuse.prompts.tokenized import TokenizedPrompt, tokenize

TOKEN_ALIGNMENTS = ("identity", "span", *REENCODINGS)
FUSE = ("all", "messages")


def default_token_alignment(same_tokenizer: bool) -> str:
    """The alignment of two models by default: they read the same ids if they can, else each its own."""
    return "identity" if same_tokenizer else "span"


@dataclass(frozen=True, kw_only=True)
class SharerPrompt:
    """A batch of prompts as one sharer reads it.

    Attributes:
        ids: ``(B, T_s)`` int64, padded left.
        mask: ``(B, T_s)`` int64, 1 where there is a token.
        positions: ``(B, T_s)`` int64, for RoPE; counted from each row's first token, so that padding shifts nothing.
        index: ``(B, T)`` int64, for each receiver position the position in ``ids`` to read; -1: nothing to read.
        texts: ``(B,)`` str, the prompts' texts, which the ids of a normalising tokenizer no longer tell; None where
            nothing follows them.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    index: Tensor
    texts: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class AlignedPrompt:
    """A batch of prompts as every model reads it. All tensors stay on the CPU until a model needs them.

    Attributes:
        ids: ``(B, T)`` int64, the receiver's, padded left.
        mask: ``(B, T)`` int64, 1 where there is a token.
        positions: ``(B, T)`` int64, for RoPE.
        sharers: One entry per sharer.
        fuse_mask: ``(B, T)`` bool, the receiver positions to fuse; never the last one, which is the first query.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    sharers: tuple[SharerPrompt, ...]
    fuse_mask: Tensor


@dataclass(frozen=True)
class AlignedRow:
    """One prompt as every model reads it: a row of an :class:`AlignedPrompt` before padding.

    Attributes:
        receiver: The receiver's tokenization.
        fusable: ``(n,)`` bool, the receiver positions to fuse.
        sharers: Each sharer's tokenization with its index ``(n,)`` int64, -1: nothing to read.
    """

    receiver: TokenizedPrompt
    fusable: np.ndarray
    sharers: tuple[tuple[TokenizedPrompt, np.ndarray], ...]


def align(
    prompt: Prompt,
    receiver: PreTrainedTokenizerBase,
    sharers: Sequence[tuple[PreTrainedTokenizerBase, str]],
    fuse: str = "all",
) -> AlignedRow:
    """Tokenize one prompt for all models and align it.

    Args:
        prompt: A text or a chat.
        receiver: The receiver's tokenizer.
        sharers: Each sharer's tokenizer and alignment, one of :data:`TOKEN_ALIGNMENTS`. Under ``identity`` the sharer
            reads the receiver's ids; under ``span`` its own; under ``reencode-…`` its own template around the
            receiver's message tokens, re-encoded one by one (:mod:`kvfuse.prompts.reencode`).
        fuse: ``all`` positions but the last, or only those of ``messages`` (the paper, for different tokenizers).

    Raises:
        PairError: An unknown name.
        PromptError: See :func:`kvfuse.prompts.chat.render`.
    """
    for option, choices, given in (
        *(("token_alignment", TOKEN_ALIGNMENTS, alignment) for _, alignment in sharers),
        ("fuse", FUSE, fuse),
    ):
        if given not in choices:
            raise PairError(f"expected {option} to be one of {', '.join(choices)}, got {given!r}; choose one")
    # 1) The receiver's tokens
    tokenized = shifted = tokenize(prompt, receiver)
    # 2) Each sharer's tokens, and which of them each receiver token reads
    pairs = []
    for tokenizer, alignment in sharers:
        if alignment == "identity":
            read, index = tokenized, np.arange(len(tokenized.ids))
        elif alignment == "span":
            read = tokenize(prompt, tokenizer)
            index = align_spans(receiver=tokenized, sharer=read)
        else:
            table = reencoding(receiver=receiver, sharer=tokenizer, strategy=alignment)
            own = tokenize(prompt, tokenizer)
            shifted, read, index = align_reencoded(receiver=tokenized, sharer=own, table=table)
        pairs.append((read, index))
    # 3) The receiver tokens to fuse
    fusable = np.ones(len(tokenized.ids), dtype=bool) if fuse == "all" else locate(tokenized).in_message
    fusable[-1:] = False
    # re-encoding shifts the receiver's positions, which several sharers would not agree on
    return AlignedRow(shifted if len(pairs) == 1 else tokenized, fusable, tuple(pairs))


def stack(rows: Sequence[AlignedRow]) -> AlignedPrompt:
    """Pad aligned prompts, all of the same models, into a batch."""
    ids, mask = pad_left([row.receiver.ids for row in rows], rows[0].receiver.pad_id)
    return AlignedPrompt(
        ids=ids,
        mask=mask,
        positions=_pad_left([row.receiver.positions for row in rows], 0),
        sharers=tuple(map(_stack_sharer, zip(*(row.sharers for row in rows), strict=True))),
        fuse_mask=_pad_left([row.fusable for row in rows], 0).bool(),
    )


def from_ids(ids: Tensor, num_sharers: int = 1, mask: Tensor | None = None) -> AlignedPrompt:
    """A prompt that is token ids already, the same for all models.

    Args:
        ids: ``(B, T)`` int64, padded left.
        num_sharers: Number of sharers that read them.
        mask: ``(B, T)``, 1 where there is a token; by default everywhere.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    positions = count_positions(mask)
    index = torch.arange(ids.shape[1]).expand_as(ids)  # (B, T)
    return AlignedPrompt(
        ids=ids,
        mask=mask,
        positions=positions,
        sharers=(SharerPrompt(ids=ids, mask=mask, positions=positions, index=index),) * num_sharers,
        fuse_mask=mask.bool() & (index < ids.shape[1] - 1),
    )


def count_positions(mask: Tensor) -> Tensor:
    """``(B, T)`` int64: the position of each token of a padded batch in its own row."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def align_spans(*, receiver: TokenizedPrompt, sharer: TokenizedPrompt) -> np.ndarray:
    """For each receiver token the sharer token with the largest character overlap, ties to the later one.

    A token of the template reads the last token of the same section of the sharer's template, which has read everything
    up to there; so the receiver's final template tokens read the sharer's last prompt token. A token that no sharer
    token overlaps, as of a message that the sharer's template leaves out or moves, reads the last one before it. Equal
    tokenizations align by identity.

    Returns:
        ``(n,)`` int64, never decreasing; -1 before the sharer's first token.
    """
    if receiver.prompt.text == sharer.prompt.text and np.array_equal(receiver.ids, sharer.ids):
        return np.arange(len(receiver.ids))
    # 1) Both on the axis that follows the receiver's text
    order = message_order(receiver.prompt)
    receiver_axis, sharer_axis = (locate(tokenized, order, drop_moved=True) for tokenized in (receiver, sharer))
    # 2) By default the sharer's last token in the section of the template that a token stands in or behind
    template = receiver_axis.middle_sections // 2 * 2
    index = np.searchsorted(sharer_axis.middle_sections, template, side="right") - 1  # (n,)
    # 3) Message tokens read the sharer's token with the largest overlap, if there is any
    tokens, readable = np.flatnonzero(receiver_axis.in_message), np.flatnonzero(sharer_axis.in_message)
    if len(readable):
        best, overlap = _largest_overlap(
            receiver=receiver_axis.characters[tokens], sharer=sharer_axis.characters[readable]
        )
        index[tokens] = np.where(overlap > 0, readable[best], index[tokens])
    # 4) Never back to an earlier token
    return np.maximum.accumulate(index)


def align_reencoded(
    *, receiver: TokenizedPrompt, sharer: TokenizedPrompt, table: np.ndarray
) -> tuple[TokenizedPrompt, TokenizedPrompt, np.ndarray]:
    """Align under re-encoding, where each message token of the receiver is one token of the sharer.

    Args:
        receiver: The receiver's tokenization.
        sharer: The sharer's own tokenization, of which the template is kept.
        table: Receiver id -> sharer id, see :func:`kvfuse.prompts.reencode.reencoding`.

    Returns:
        Receiver and sharer at positions that they share, the sharer's offsets zero (a re-encoded token need not stand
        for characters); the index as in :func:`align_spans`.
    """
    order = message_order(receiver.prompt)
    sections, sharer_sections = (locate(one, order, drop_moved=True).sections for one in (receiver, sharer))
    ids, spliced, index = splice(
        receiver_ids=receiver.ids,
        receiver_sections=sections,
        sharer_ids=sharer.ids,
        sharer_sections=sharer_sections,
        table=table,
    )
    positions, sharer_positions = common_positions(receiver_sections=sections, sharer_sections=spliced)
    offsets = np.zeros((len(ids), 2), dtype=np.int64)
    return (
        replace(receiver, positions=positions),
        replace(sharer, ids=ids, offsets=offsets, positions=sharer_positions),
        index,
    )


Aligned = AlignedPrompt | AlignedRow | Sequence[AlignedRow]
"""What :meth:`kvfuse.CacheToCache.align` gives, one prompt or several, padded into a batch already or not."""


def pad_left(rows: Sequence[np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    """Stack rows of unequal length into ``(B, T)`` int64, padded left, with a mask that is 1 where a row is."""
    return _pad_left(rows, fill), _pad_left([np.ones(len(row), dtype=np.int64) for row in rows], 0)


def _pad_left(rows: Sequence[np.ndarray], fill: int) -> Tensor:
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[len(target) - len(row) :] = row
    return torch.from_numpy(padded)


def as_prompt(prompt: Aligned) -> AlignedPrompt:
    """A batch of aligned prompts as it is; one or several padded into a batch."""
    if isinstance(prompt, AlignedPrompt):
        return prompt
    return stack([prompt] if isinstance(prompt, AlignedRow) else prompt)


def _stack_sharer(rows: Sequence[tuple[TokenizedPrompt, np.ndarray]]) -> SharerPrompt:
    ids, mask = pad_left([read.ids for read, _ in rows], rows[0][0].pad_id)
    length = ids.shape[1]
    # padding moves the tokens that the index points to
    moved = [np.where(index >= 0, index + length - len(read.ids), -1) for read, index in rows]
    positions = _pad_left([read.positions for read, _ in rows], 0)
    texts = np.array([read.prompt.text for read, _ in rows], dtype=object)  # (B,)
    return SharerPrompt(ids=ids, mask=mask, positions=positions, index=_pad_left(moved, -1), texts=texts)


def _largest_overlap(*, receiver: np.ndarray, sharer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each receiver interval the sharer interval that overlaps it most, ties to the later.

    Args:
        receiver: ``(n, 2)`` int64, starts and ends, sorted.
        sharer: ``(m, 2)`` int64, likewise.

    Returns:
        The sharer interval and the overlap, ``(n,)`` int64 each.
    """
    (starts, ends), (sharer_starts, sharer_ends) = receiver.T, sharer.T
    # 1) Receiver interval i meets the sharer intervals low[i] ... high[i]
    low = np.minimum(np.searchsorted(sharer_ends, starts, side="right"), len(sharer) - 1)
    high = np.maximum(np.searchsorted(sharer_starts, ends, side="left") - 1, low)
    # 2) All pairs that meet, laid out flat
    counts = high - low + 1
    first = np.cumsum(counts) - counts
    own = np.repeat(np.arange(len(receiver)), counts)
    other = np.arange(counts.sum()) - np.repeat(first - low, counts)
    overlap = np.minimum(ends[own], sharer_ends[other]) - np.maximum(starts[own], sharer_starts[other])
    # 3) One number per pair, the overlap before the index, so that one maximum finds both
    size = len(sharer) + 1
    ranked = np.maximum(overlap, 0) * size + other
    overlap, best = np.divmod(np.maximum.reduceat(ranked, first) if len(receiver) else first, size)
    return best, overlap
