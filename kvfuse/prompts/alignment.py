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
from kvfuse.prompts.chat import Prompt
from kvfuse.prompts.message_axis import drop_moved, in_messages, message_order, on_axis, own_spans, places, sections
from kvfuse.prompts.reencode import REENCODINGS, common_positions, reencoding, splice
from kvfuse.prompts.tokenized import TokenizedPrompt, read

TOKEN_ALIGNMENTS = ("identity", "span", *REENCODINGS)
FUSE = ("all", "messages")


def default_token_alignment(same_tokenizer: bool) -> str:
    """How two models are aligned where nobody says: they read the same ids if they can, else each its own."""
    return "identity" if same_tokenizer else "span"


@dataclass(frozen=True, kw_only=True)
class SharerPrompt:
    """What one sharer reads, and where the receiver finds it.

    Attributes:
        ids: ``(B, T_s)`` int64, padded left.
        mask: ``(B, T_s)`` int64, 1 where there is a token.
        positions: ``(B, T_s)`` int64, for RoPE; counted from each row's first token, so that padding shifts nothing.
        index: ``(B, T)`` int64, for each receiver position the position in ``ids`` to read; -1: nothing to read.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    index: Tensor


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
        receiver: The receiver's reading.
        fusable: ``(n,)`` bool, the receiver positions to fuse.
        sharers: Each sharer's reading with its index ``(n,)`` int64, -1: nothing to read.
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
        sharers: Each sharer's tokenizer and how it is aligned, one of :data:`TOKEN_ALIGNMENTS`. Under ``identity`` the
            sharer reads the receiver's ids; under ``span`` its own; under ``reencode-…`` its own template around the
            receiver's message tokens, re-encoded one by one (:mod:`kvfuse.prompts.reencode`).
        fuse: ``all`` positions but the last, or only those of ``messages`` (the paper, for different tokenizers).

    Raises:
        PairError: An unknown name.
        PromptError: See :func:`kvfuse.prompts.chat.render`.
    """
    for option, choices, given in (
        *(("token_alignment", TOKEN_ALIGNMENTS, how) for _, how in sharers),
        ("fuse", FUSE, fuse),
    ):
        if given not in choices:
            raise PairError(f"expected {option} to be one of {', '.join(choices)}, got {given!r}; choose one")
    mine = read(prompt, receiver)
    moved, theirs, indices = zip(
        *(_align_one(mine, prompt, receiver, tokenizer, how) for tokenizer, how in sharers), strict=True
    )
    placed = (
        moved[0] if len(sharers) == 1 else mine
    )  # one sharer may move the receiver's positions, several may not agree
    return AlignedRow(placed, _fusable(mine, fuse), tuple(zip(theirs, indices, strict=True)))


def stack(rows: Sequence[AlignedRow]) -> AlignedPrompt:
    """Pad aligned prompts, all of the same models, into a batch."""
    ids, mask = pad_left([row.receiver.ids for row in rows], rows[0].receiver.pad_id)
    sharers = []
    for column in zip(*(row.sharers for row in rows), strict=True):
        their_ids, their_mask = pad_left([theirs.ids for theirs, _ in column], column[0][0].pad_id)
        length = their_ids.shape[1]
        shifted = [np.where(index >= 0, index + length - len(theirs.ids), -1) for theirs, index in column]
        positions = pad_left([theirs.positions for theirs, _ in column], 0)[0]
        sharers.append(
            SharerPrompt(ids=their_ids, mask=their_mask, positions=positions, index=pad_left(shifted, -1)[0])
        )
    fuse_mask = pad_left([row.fusable for row in rows], 0)[0].bool()
    positions = pad_left([row.receiver.positions for row in rows], 0)[0]
    return AlignedPrompt(ids=ids, mask=mask, positions=positions, sharers=tuple(sharers), fuse_mask=fuse_mask)


def from_ids(ids: Tensor, num_sharers: int = 1, mask: Tensor | None = None) -> AlignedPrompt:
    """A prompt that is token ids already, read by all models alike.

    Args:
        ids: ``(B, T)`` int64, padded left.
        num_sharers: How many read them.
        mask: ``(B, T)``, 1 where there is a token; by default everywhere.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    index = torch.arange(ids.shape[1]).expand_as(ids)
    fuse_mask = mask.bool() & (index < ids.shape[1] - 1)
    reads = SharerPrompt(ids=ids, mask=mask, positions=count_positions(mask), index=index)
    return AlignedPrompt(
        ids=ids, mask=mask, positions=reads.positions, sharers=(reads,) * num_sharers, fuse_mask=fuse_mask
    )


def count_positions(mask: Tensor) -> Tensor:
    """``(B, T)`` int64: where each token of a padded batch stands in its own row."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def align_spans(receiver: TokenizedPrompt, sharer: TokenizedPrompt) -> np.ndarray:
    """For each receiver token the sharer token with the largest character overlap, ties to the later one.

    A token of the template reads the last token of the sharer's template at the same place, which has read everything up
    to there; so the receiver's final template tokens read the sharer's last prompt token. A token that no sharer token overlaps,
    as of a message that the sharer's template leaves out or moves, reads the last one before it. Equal readings align by identity.

    Returns:
        ``(n,)`` int64, never decreasing; -1 before the sharer's first token.
    """
    if receiver.prompt.text == sharer.prompt.text and np.array_equal(receiver.ids, sharer.ids):
        return np.arange(len(receiver.ids))
    spans, sharer_spans = _common_spans(receiver, sharer)
    starts, ends = in_messages(receiver, spans)
    sharer_starts, sharer_ends = in_messages(sharer, sharer_spans)
    in_message = np.flatnonzero(ends > starts)
    readable = np.flatnonzero(sharer_ends > sharer_starts)
    template = sections(receiver, spans) // 2 * 2  # the one that a token stands in, or that stands before its message
    index = (
        np.searchsorted(sections(sharer, sharer_spans), template, side="right") - 1
    )  # the sharer's last token there, or before
    if len(readable):
        best, overlap = _largest_overlap(
            starts[in_message], ends[in_message], sharer_starts[readable], sharer_ends[readable]
        )
        index[in_message] = np.where(overlap > 0, readable[best], index[in_message])
    return np.maximum.accumulate(index)


def align_reencoded(
    receiver: TokenizedPrompt, sharer: TokenizedPrompt, table: np.ndarray
) -> tuple[TokenizedPrompt, TokenizedPrompt, np.ndarray]:
    """What the sharer reads under re-encoding, where each message token of the receiver is one token of the sharer.

    Args:
        receiver: The receiver's reading.
        sharer: The sharer's own reading, of which the template is kept.
        table: Receiver id -> sharer id, see :func:`kvfuse.prompts.reencode.reencoding`.

    Returns:
        Both readings at positions that they share, the sharer's offsets zero (a re-encoded token need not stand for
        characters); the index as in :func:`align_spans`.
    """
    spans, sharer_spans = _common_spans(receiver, sharer)
    mine = places(receiver, spans)
    ids, theirs, index = splice(receiver.ids, mine, sharer.ids, places(sharer, sharer_spans), table)
    positions, their_positions = common_positions(mine, theirs)
    read = replace(sharer, ids=ids, offsets=np.zeros((len(ids), 2), dtype=np.int64), positions=their_positions)
    return replace(receiver, positions=positions), read, index


def pad_left(rows: Sequence[np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    """Stack rows of unequal length into ``(B, T)`` int64, padded left, with the mask of what is not padding."""
    length = max(len(row) for row in rows)
    padded = np.full((len(rows), length), fill, dtype=np.int64)
    mask = np.zeros_like(padded)
    for i, row in enumerate(rows):
        padded[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


def _align_one(
    mine: TokenizedPrompt, prompt: Prompt, receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, how: str
) -> tuple[TokenizedPrompt, TokenizedPrompt, np.ndarray]:
    """The receiver's reading, the sharer's, and the index of one in the other."""
    if how == "identity":
        return mine, mine, np.arange(len(mine.ids))
    theirs = read(prompt, sharer)
    if how == "span":
        return mine, theirs, align_spans(mine, theirs)
    return align_reencoded(mine, theirs, reencoding(receiver, sharer, how))


def _common_spans(receiver: TokenizedPrompt, sharer: TokenizedPrompt) -> tuple[np.ndarray, np.ndarray]:
    """The messages' spans in both readings, on the axis that follows the receiver's text."""
    order = message_order(receiver.prompt)
    return drop_moved(on_axis(receiver.prompt, order)), drop_moved(on_axis(sharer.prompt, order))


def _fusable(reading: TokenizedPrompt, fuse: str) -> np.ndarray:
    """``(n,)`` bool: the positions of a prompt that may be fused."""
    fusable = np.ones(len(reading.ids), dtype=bool)
    if fuse == "messages":
        starts, ends = in_messages(reading, own_spans(reading.prompt))
        fusable = ends > starts
    fusable[-1:] = False
    return fusable


def _largest_overlap(
    starts: np.ndarray, ends: np.ndarray, their_starts: np.ndarray, their_ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each interval of ours the one of theirs that overlaps it most, ties to the later, and by how much.

    All four are sorted. Pairs are laid out flat: interval ``i`` of ours meets theirs ``low[i] … high[i]``.
    """
    low = np.minimum(np.searchsorted(their_ends, starts, side="right"), len(their_ends) - 1)
    high = np.maximum(np.searchsorted(their_starts, ends, side="left") - 1, low)
    counts = high - low + 1
    first = np.cumsum(counts) - counts
    ours = np.repeat(np.arange(len(starts)), counts)
    theirs = np.arange(counts.sum()) - np.repeat(first - low, counts)
    overlap = np.maximum(np.minimum(ends[ours], their_ends[theirs]) - np.maximum(starts[ours], their_starts[theirs]), 0)
    best = np.maximum.reduceat(overlap * (len(their_ends) + 1) + theirs, first) if len(starts) else first
    return best % (len(their_ends) + 1), best // (len(their_ends) + 1)
