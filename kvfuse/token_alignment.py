"""The same prompt as receiver ids and sharer ids; for every receiver position the sharer position that covers it.

```
text        What  is   Oslo ?   <eot> <assistant>
receiver    What  is   Os   lo  ?   <end> <start> assistant \\n
sharer      What  is   Oslo ?   <eot> <assistant>
index       0     1    2    2   3   5     5       5         -      (the last prompt token is never fused)
```
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvfuse.chat import Prompt, RenderedPrompt, as_chat, render
from kvfuse.errors import PairError

TOKEN_ALIGNMENTS = ("identity", "span")


@dataclass(frozen=True, kw_only=True)
class SharerPrompt:
    """What one sharer reads, and where the receiver finds it.

    Attributes:
        ids: ``(B, T_s)`` int64, padded left.
        mask: ``(B, T_s)`` int64, 1 where there is a token.
        index: ``(B, T)`` int64, for each receiver position the position in ``ids`` to read; -1: nothing to read.
    """

    ids: Tensor
    mask: Tensor
    index: Tensor


@dataclass(frozen=True, kw_only=True)
class AlignedPrompt:
    """A batch of prompts as every model reads it. All tensors stay on the CPU until a model needs them.

    Attributes:
        ids: ``(B, T)`` int64, the receiver's, padded left.
        mask: ``(B, T)`` int64, 1 where there is a token.
        sharers: One entry per sharer.
        fuse_mask: ``(B, T)`` bool, the receiver positions to fuse; never the last one, which is the first query.
    """

    ids: Tensor
    mask: Tensor
    sharers: tuple[SharerPrompt, ...]
    fuse_mask: Tensor


@dataclass(frozen=True)
class Reading:
    """One model's tokenization of one prompt.

    Attributes:
        ids: ``(n,)`` int64.
        offsets: ``(n, 2)`` int64, the characters of the text that each token covers.
        prompt: The text.
        pad_id: What to pad ``ids`` with.
    """

    ids: np.ndarray
    offsets: np.ndarray
    prompt: RenderedPrompt
    pad_id: int


@dataclass(frozen=True)
class AlignedReading:
    """One prompt as every model reads it: a row of an :class:`AlignedPrompt` before padding.

    Attributes:
        receiver: The receiver's reading.
        fusable: ``(n,)`` bool, the receiver positions to fuse.
        sharers: Each sharer's reading with its index ``(n,)`` int64, -1: nothing to read.
    """

    receiver: Reading
    fusable: np.ndarray
    sharers: tuple[tuple[Reading, np.ndarray], ...]


def read(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Reading:
    """Render and tokenize a prompt for one model.

    Raises:
        PromptError: See :func:`kvfuse.chat.render`.
    """
    rendered = render(prompt, tokenizer)
    encoded = tokenizer(rendered.text, add_special_tokens=not rendered.templated, return_offsets_mapping=True)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return Reading(np.array(encoded["input_ids"], dtype=np.int64), offsets, rendered, tokenizer.pad_token_id or 0)


def align(
    prompt: Prompt,
    receiver: PreTrainedTokenizerBase,
    sharers: Sequence[tuple[PreTrainedTokenizerBase, str]],
    fuse: str = "all",
) -> AlignedReading:
    """Tokenize one prompt for all models and align it.

    Args:
        prompt: A text or a chat.
        receiver: The receiver's tokenizer.
        sharers: Each sharer's tokenizer and how it is aligned, one of :data:`TOKEN_ALIGNMENTS`. Under ``identity`` the
            sharer reads the receiver's ids; under ``span`` its own.
        fuse: ``all`` positions but the last, or only those of ``messages`` (the paper, for different tokenizers).

    Raises:
        PairError: An unknown name.
        PromptError: See :func:`kvfuse.chat.render`.
    """
    mine = read(prompt, receiver)
    aligned = []
    for tokenizer, how in sharers:
        if how not in TOKEN_ALIGNMENTS:
            raise PairError(f"expected token_alignment to be one of {', '.join(TOKEN_ALIGNMENTS)}, got {how!r}; choose one")
        theirs = mine if how == "identity" else read(prompt, tokenizer)
        aligned.append((theirs, np.arange(len(mine.ids)) if how == "identity" else align_spans(mine, theirs)))
    return AlignedReading(mine, _fusable(mine, fuse), tuple(aligned))


def stack(rows: Sequence[AlignedReading]) -> AlignedPrompt:
    """Pad aligned prompts, all of the same models, into a batch."""
    ids, mask = pad_left([row.receiver.ids for row in rows], rows[0].receiver.pad_id)
    sharers = []
    for column in zip(*(row.sharers for row in rows), strict=True):
        their_ids, their_mask = pad_left([theirs.ids for theirs, _ in column], column[0][0].pad_id)
        length = their_ids.shape[1]
        shifted = [np.where(index >= 0, index + length - len(theirs.ids), -1) for theirs, index in column]
        sharers.append(SharerPrompt(ids=their_ids, mask=their_mask, index=pad_left(shifted, -1)[0]))
    fuse_mask = pad_left([row.fusable for row in rows], 0)[0].bool()
    return AlignedPrompt(ids=ids, mask=mask, sharers=tuple(sharers), fuse_mask=fuse_mask)


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
    return AlignedPrompt(ids=ids, mask=mask, sharers=(SharerPrompt(ids=ids, mask=mask, index=index),) * num_sharers, fuse_mask=fuse_mask)


def describe(prompt: Prompt, receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, how: str) -> Iterator[str]:
    """An alignment in two columns, line by line: each receiver token and the sharer token it reads."""
    aligned = align(as_chat(prompt), receiver, [(sharer, how)])
    reading, index = aligned.sharers[0]
    mine = [repr(receiver.decode(token))[1:-1] for token in aligned.receiver.ids]
    theirs = [repr(sharer.decode(token))[1:-1] for token in reading.ids]
    width = max(map(len, [*mine, "receiver"]))
    yield f"{'receiver':{width}}  sharer"
    for token, position, fused in zip(mine, index, aligned.fusable, strict=True):
        yield f"{token:{width}}  {theirs[position] if fused and position >= 0 else '-'}"
    fused_count = int((aligned.fusable & (index >= 0)).sum())
    yield f"{how}: {len(mine)} receiver tokens, {fused_count} fused; {len(theirs)} sharer tokens"


def align_spans(receiver: Reading, sharer: Reading) -> np.ndarray:
    """For each receiver token the sharer token with the largest character overlap, ties to the later one.

    A token of the template reads the last token of the sharer's template at the same place, which has read everything up
    to there; so the receiver's final template tokens read the sharer's last prompt token. Equal readings align by identity.
    A message that the sharer's template leaves out, or writes in another order than most, reads what was read before it.

    Returns:
        ``(n,)`` int64, never decreasing; -1 before the sharer's first token.
    """
    if receiver.prompt.text == sharer.prompt.text and np.array_equal(receiver.ids, sharer.ids):
        return np.arange(len(receiver.ids))
    order = _message_order(receiver.prompt)
    spans, sharer_spans = (_drop_moved(_on_axis(reading.prompt, order)) for reading in (receiver, sharer))
    starts, ends = _in_messages(receiver, spans)
    sharer_starts, sharer_ends = _in_messages(sharer, sharer_spans)
    in_message = np.flatnonzero(ends > starts)
    readable = np.flatnonzero(sharer_ends > sharer_starts)
    sections = _sections(receiver, spans)
    last = np.searchsorted(_sections(sharer, sharer_spans), sections, side="right") - 1  # the sharer's last token there, or before
    index = np.where(sections % 2 == 0, last, -1)
    if len(readable):
        best, overlap = _largest_overlap(starts[in_message], ends[in_message], sharer_starts[readable], sharer_ends[readable])
        index[in_message] = np.where(overlap > 0, readable[best], -1)
    return np.maximum.accumulate(index)


def pad_left(rows: Sequence[np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    """Stack rows of unequal length into ``(B, T)`` int64, padded left, with the mask of what is not padding."""
    length = max(len(row) for row in rows)
    padded = np.full((len(rows), length), fill, dtype=np.int64)
    mask = np.zeros_like(padded)
    for i, row in enumerate(rows):
        padded[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


def _fusable(reading: Reading, fuse: str) -> np.ndarray:
    """``(n,)`` bool: the positions of a prompt that may be fused."""
    starts, ends = _in_messages(reading, _on_axis(reading.prompt, _message_order(reading.prompt)))
    fusable = np.ones(len(reading.ids), dtype=bool) if fuse == "all" else ends > starts
    fusable[-1:] = False
    return fusable


def _message_order(prompt: RenderedPrompt) -> np.ndarray:
    """``(messages,)``: the rank of each message in the text; one that the template leaves out follows the one before it."""
    first = np.full(len(prompt.messages), -1)
    for span in reversed(prompt.spans):
        first[span.message] = span.start
    written = np.maximum.accumulate(np.where(first >= 0, np.arange(len(first)), 0))
    return np.argsort(np.argsort(first[written], kind="stable"))


def _on_axis(prompt: RenderedPrompt, rank: np.ndarray) -> np.ndarray:
    """``(k, 4)``: start and end of each span, the rank of its message, and its start on an axis that all models share.

    On the axis stand the messages alone, by rank, each with its own length, however much of it the template writes.
    """
    spans = np.array([(span.start, span.end, span.message, span.offset) for span in prompt.spans], dtype=np.int64).reshape(-1, 4)
    lengths = np.zeros(len(rank) + 1, dtype=np.int64)
    lengths[rank + 1] = [len(content) for content in prompt.messages]
    spans[:, 2] = rank[spans[:, 2]]
    spans[:, 3] += np.cumsum(lengths)[spans[:, 2]]
    return spans


def _drop_moved(spans: np.ndarray) -> np.ndarray:
    """The spans that stand in the text as on the axis. What this template writes elsewhere, or again, is left to it.

    Either the spans that go back are dropped or those that run ahead, whichever are shorter.
    """
    sizes = spans[:, 1] - spans[:, 0]
    starts, ends = spans[:, 3], spans[:, 3] + sizes
    reached = np.maximum.accumulate(np.append(0, ends))[:-1]
    ahead = np.minimum.accumulate(np.append(starts, ends.max(initial=0))[::-1])[::-1][1:]
    return spans[max(starts >= reached, ends <= ahead, key=lambda kept: sizes[kept].sum())]


def _in_messages(reading: Reading, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each token's first and last character on the axis of :func:`_on_axis`. A token of the template covers nothing."""
    spans = np.vstack([np.zeros(4, dtype=np.int64), spans])  # before the first there is an empty one
    start, end, _, axis = spans[np.searchsorted(spans[:, 0], reading.offsets[:, 1]) - 1].T  # the last that begins before
    first, last = np.clip(reading.offsets, start[:, None], end[:, None]).T
    inside = last > first
    return np.where(inside, first - start + axis, 0), np.where(inside, last - start + axis, 0)


def _sections(reading: Reading, spans: np.ndarray) -> np.ndarray:
    """``(n,)``, never decreasing: 2k for a token of the template before the k-th message, 2k + 1 for all within that message."""
    section = np.append(np.column_stack([2 * spans[:, 2], 2 * spans[:, 2] + 1]), 2 * len(reading.prompt.messages))
    middles = reading.offsets.sum(axis=1)  # doubled; a token without characters belongs to what comes before it
    places = np.searchsorted(2 * spans[:, :2].reshape(-1), middles, side="left")
    return np.maximum.accumulate(section[places])  # what the template writes inside a message belongs to it


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
