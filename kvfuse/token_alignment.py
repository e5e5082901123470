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
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvfuse.chat import Prompt, RenderedPrompt, render
from kvfuse.errors import PairError
from kvfuse.reencode import REENCODINGS, reencoding, splice

TOKEN_ALIGNMENTS = ("identity", "span", *REENCODINGS)
FUSE = ("all", "messages")


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
        offsets: ``(n, 2)`` int64, the characters of the text that each token covers; a piece of a character covers all of it.
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
    pairs = encoded["offset_mapping"]
    offsets = np.fromiter(chain.from_iterable(pairs), dtype=np.int64, count=2 * len(pairs)).reshape(-1, 2)  # 3.5 x np.array
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    if rendered.templated:  # else there are no special tokens in the text
        _release_space(offsets, ids, rendered.text, tokenizer)
    return Reading(ids, _cover_composed(offsets, rendered.text), rendered, tokenizer.pad_token_id or 0)


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
            sharer reads the receiver's ids; under ``span`` its own; under ``reencode-…`` its own template around the
            receiver's message tokens, re-encoded one by one (:mod:`kvfuse.reencode`).
        fuse: ``all`` positions but the last, or only those of ``messages`` (the paper, for different tokenizers).

    Raises:
        PairError: An unknown name.
        PromptError: See :func:`kvfuse.chat.render`.
    """
    for option, choices, given in (*(("token_alignment", TOKEN_ALIGNMENTS, how) for _, how in sharers), ("fuse", FUSE, fuse)):
        if given not in choices:
            raise PairError(f"expected {option} to be one of {', '.join(choices)}, got {given!r}; choose one")
    mine = read(prompt, receiver)
    aligned = tuple(_align_one(mine, prompt, receiver, tokenizer, how) for tokenizer, how in sharers)
    return AlignedReading(mine, _fusable(mine, fuse), aligned)


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


def align_spans(receiver: Reading, sharer: Reading) -> np.ndarray:
    """For each receiver token the sharer token with the largest character overlap, ties to the later one.

    A token of the template reads the last token of the sharer's template at the same place, which has read everything up
    to there; so the receiver's final template tokens read the sharer's last prompt token. A token that no sharer token overlaps
    reads the last one before it. Equal readings align by identity.

    Returns:
        ``(n,)`` int64, never decreasing; -1 before the sharer's first token.
    """
    if receiver.prompt.text == sharer.prompt.text and np.array_equal(receiver.ids, sharer.ids):
        return np.arange(len(receiver.ids))
    starts, ends = _in_messages(receiver)
    sharer_starts, sharer_ends = _in_messages(sharer)
    in_message = np.flatnonzero(ends > starts)
    readable = np.flatnonzero(sharer_ends > sharer_starts)
    template = places(receiver) // 2 * 2  # the one that a token stands in, or that stands before its message
    index = np.searchsorted(_sections(sharer), template, side="right") - 1  # the sharer's last token there, or before it
    if len(readable):
        best, overlap = _largest_overlap(starts[in_message], ends[in_message], sharer_starts[readable], sharer_ends[readable])
        index[in_message] = np.where(overlap > 0, readable[best], index[in_message])
    return np.maximum.accumulate(index)


def align_reencoded(receiver: Reading, sharer: Reading, table: np.ndarray) -> tuple[Reading, np.ndarray]:
    """What the sharer reads under re-encoding, where each message token of the receiver is one token of the sharer.

    Args:
        receiver: The receiver's reading.
        sharer: The sharer's own reading, of which the template is kept.
        table: Receiver id -> sharer id, see :func:`kvfuse.reencode.reencoding`.

    Returns:
        The sharer's reading, its offsets zero (a re-encoded token need not stand for characters); the index as in
        :func:`align_spans`.
    """
    ids, index = splice(receiver.ids, places(receiver), sharer.ids, places(sharer), table)
    return replace(sharer, ids=ids, offsets=np.zeros((len(ids), 2), dtype=np.int64)), index


def places(reading: Reading) -> np.ndarray:
    """Where each token stands, ``(n,)`` int64: 2k in the template before message k, 2k + 1 where it covers any of message k."""
    starts, ends = reading.offsets.T
    first_characters = replace(reading, offsets=np.stack([starts, np.minimum(ends, starts + 1)], axis=1))
    sections = _sections(first_characters)
    first, last = _in_messages(reading)
    return np.where(last > first, sections | 1, sections + sections % 2)


def covered(reading: Reading, tokens: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Which characters of the messages, one message after the other, the tokens cover, ``(characters,)`` bool."""
    size = sum(map(len, reading.prompt.messages)) + 1
    starts, ends = (edges[tokens] for edges in _in_messages(reading))
    return np.cumsum(np.bincount(starts, minlength=size) - np.bincount(ends, minlength=size))[:-1] > 0


def pad_left(rows: Sequence[np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    """Stack rows of unequal length into ``(B, T)`` int64, padded left, with the mask of what is not padding."""
    length = max(len(row) for row in rows)
    padded = np.full((len(rows), length), fill, dtype=np.int64)
    mask = np.zeros_like(padded)
    for i, row in enumerate(rows):
        padded[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    return torch.from_numpy(padded), torch.from_numpy(mask)


def _align_one(
    mine: Reading, prompt: Prompt, receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, how: str
) -> tuple[Reading, np.ndarray]:
    if how == "identity":
        return mine, np.arange(len(mine.ids))
    theirs = read(prompt, sharer)
    if how == "span":
        return theirs, align_spans(mine, theirs)
    return align_reencoded(mine, theirs, reencoding(receiver, sharer, how))


def _release_space(offsets: np.ndarray, ids: np.ndarray, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep special tokens to their own text, in place. Some (phi-4's) swallow the white space beside them, a message's or not."""
    greedy = [token for token, added in tokenizer.added_tokens_decoder.items() if added.lstrip or added.rstrip]
    for place in np.flatnonzero(np.isin(ids, greedy)):
        start, end = offsets[place]
        offsets[place] = end - len(text[start:end].lstrip()), start + len(text[start:end].rstrip())


def _cover_composed(offsets: np.ndarray, text: str) -> np.ndarray:
    """Let a token cover the characters that a normaliser composed into its last one: of ``e + \u0301`` it names only the e.

    They are those that no token covers. Spaces are never composed; some tokenizers leave them out of a word's offsets.
    """
    starts, ends = offsets[offsets[:, 1] > offsets[:, 0]].T
    reach = np.maximum.accumulate(ends)
    following = np.append(starts[1:], len(text))
    gaps = np.array([gap for gap in np.flatnonzero(following > reach) if not text[reach[gap]].isspace()], dtype=np.int64)
    if not len(gaps):
        return offsets
    gap = gaps[np.minimum(np.searchsorted(reach[gaps], offsets[:, 1]), len(gaps) - 1)]
    composed = (reach[gap] == offsets[:, 1]) & (offsets[:, 1] > offsets[:, 0])
    return np.stack([offsets[:, 0], np.where(composed, following[gap], offsets[:, 1])], axis=1)


def _fusable(reading: Reading, fuse: str) -> np.ndarray:
    """``(n,)`` bool: the positions of a prompt that may be fused."""
    starts, ends = _in_messages(reading)
    fusable = np.ones(len(reading.ids), dtype=bool) if fuse == "all" else ends > starts
    fusable[-1:] = False
    return fusable


def _in_messages(reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """Each token's first and last character within the messages alone, on an axis that is the same for all models.

    Message ``i`` takes up its own length on the axis, trimmed or not. A token of the template covers nothing.
    """
    starts, ends = np.zeros((2, len(reading.ids)), dtype=np.int64)
    origin = 0
    for content, span in zip(reading.prompt.messages, reading.prompt.spans, strict=True):
        first, last = np.clip(reading.offsets, span.start, span.end).T
        inside = last > first
        shift = origin + span.skipped - span.start
        starts[inside], ends[inside] = first[inside] + shift, last[inside] + shift
        origin += len(content)
    return starts, ends


def _sections(reading: Reading) -> np.ndarray:
    """``(n,)``, never decreasing: 2k for a token of the template before message k, 2k + 1 for one of message k itself."""
    boundaries = np.array([(span.start, span.end) for span in reading.prompt.spans]).reshape(-1)
    middles = reading.offsets.sum(axis=1)  # doubled; a token without characters belongs to what comes before it
    return np.maximum.accumulate(np.searchsorted(2 * boundaries, middles, side="left"))


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
