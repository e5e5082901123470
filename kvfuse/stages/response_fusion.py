"""Fuse what is generated too: all models read the response along, and each new position is fused as it comes.

At every step the receiver reads the new token into a clean cache of its own, the sharers read it too, and the fused keys and
values stand in the cache that the receiver decodes from. A sharer with another tokenizer reads its own tokens of the text so
far; where they come out otherwise than before, it forgets the last few and reads them again.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase

from kvfuse.cache.transformers_cache import KV, keep_rows, read_cache, stage
from kvfuse.language_model import LanguageModel
from kvfuse.prompts.alignment import AlignedPrompt, SharerPrompt, count_positions, pad_left
from kvfuse.prompts.reencode import REENCODINGS, reencoding
from kvfuse.stages.prefill import prefill

CONTEXT_TOKENS, CONTEXT_CHARACTERS = (
    16,
    48,
)  # within which a new piece may change how the text before it is cut into tokens


@dataclass
class ModelCaches:
    """What every model has read, each in a cache of its own; nothing in them is fused.

    Attributes:
        receiver: All prompt positions but the last.
        sharers: All positions of their prompts.
    """

    receiver: Cache
    sharers: list[Cache]


class ResponseFuser:
    """Reads a response along with every model and fuses its positions.

    Args:
        receiver: The model that answers.
        sharers: The models that only read, each with its ``token_alignment``.
        prompt: What all of them have read.
        streams: Their caches of it, which are filled further.
        fuse: What fuses new positions: a prompt, the receiver's keys and values, and each sharer's (:func:`kvfuse.stages.fuse.fuse`).
    """

    def __init__(
        self,
        receiver: LanguageModel,
        sharers: Sequence[tuple[LanguageModel, str]],
        prompt: AlignedPrompt,
        streams: ModelCaches,
        fuse: Callable[[AlignedPrompt, KV, Sequence[KV]], KV],
    ) -> None:
        self.receiver, self.cache, self.fuse = receiver, streams.receiver, fuse
        rows = _unpad(prompt.ids, prompt.mask)
        self.sharers = []
        for (sharer, how), cache, reads in zip(sharers, streams.sharers, prompt.sharers, strict=True):
            theirs = _unpad(reads.ids, reads.mask)
            writers = [
                _writer(how, receiver.tokenizer, sharer.tokenizer, *both) for both in zip(rows, theirs, strict=True)
            ]
            self.sharers.append(_SharerStream(sharer, cache, reads.positions[:, -1:], theirs, writers))
        self.position = prompt.positions[:, -1:]  # (B, 1), of the token to read next
        self.started = False

    def read(self, ids: Tensor, mask: Tensor) -> KV:
        """Read one new token per row with every model and fuse its position.

        Args:
            ids: ``(B, 1)`` int64, the receiver's; the first is the last prompt token, which the sharers have read.
            mask: ``(B, n + 1)``: the ``n`` positions before it and itself.

        Returns:
            ``(L, B, H, 1, D)``.
        """
        prefill(self.receiver.model, ids, mask.cpu(), self.position, self.cache)
        if self.started:
            for sharer in self.sharers:
                sharer.read(ids[:, 0].tolist())
        self.started = True
        theirs = [read_cache(sharer.cache, last=1) for sharer in self.sharers]
        prompt = _one_position(self.position, [sharer.last_position for sharer in self.sharers])
        self.position = self.position + 1
        return self.fuse(prompt, read_cache(self.cache, last=1), theirs)

    def feed(self, cache: Cache, ids: Tensor, mask: Tensor) -> None:
        """Read a token per row and have it stand fused in the receiver's cache when the model reads it next."""
        stage(cache, self.read(ids, mask))

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows, repeated or left out, as beams are."""
        for cache in (self.cache, *(sharer.cache for sharer in self.sharers)):
            cache.reorder_cache(rows)
        self.position = self.position[rows.cpu()]
        for sharer in self.sharers:
            sharer.reorder(rows.tolist())


class _SharerStream:
    """One sharer, its cache, and per row the ids in it and what turns the receiver's tokens into more of them.

    Attributes:
        skipped: Positions that each row's prompt has left out.
    """

    def __init__(
        self, sharer: LanguageModel, cache: Cache, last: Tensor, rows: list[list[int]], writers: list[Any]
    ) -> None:
        self.sharer, self.cache, self.rows, self.writers = sharer, cache, rows, writers
        self.skipped = [position + 1 - len(row) for position, row in zip(last[:, 0].tolist(), rows, strict=True)]

    @property
    def last_position(self) -> Tensor:
        """``(B, 1)`` int64: where each row's last token stands."""
        return torch.tensor([[len(row) + skipped - 1] for row, skipped in zip(self.rows, self.skipped, strict=True)])

    def read(self, tokens: list[int]) -> None:
        """Read what the receiver's new tokens mean for this sharer.

        Every row is fed the same number of tokens, those it lacks and before them some that it knows: so all rows end in
        the last column and need no padding within.
        """
        changes = [writer.next(token) for writer, token in zip(self.writers, tokens, strict=True)]
        wanted = [row[: len(row) - dropped] + added for row, (dropped, added) in zip(self.rows, changes, strict=True)]
        feed = max(len(added) for _, added in changes)
        if feed == 0:
            return
        held, kept = [len(row) for row in self.rows], [max(len(row) - feed, 0) for row in wanted]
        if kept != held:
            keep_rows(self.cache, kept, held)
        ids, mask = pad_left([np.array(row[keep:], dtype=np.int64) for row, keep in zip(wanted, kept, strict=True)], 0)
        _, before = pad_left([np.zeros(keep, dtype=np.int64) for keep in kept], 0)
        mask = torch.cat([before, mask], dim=1)
        positions = (count_positions(mask) + torch.tensor(self.skipped)[:, None])[:, -ids.shape[1] :]
        prefill(self.sharer.model, ids, mask, positions, self.cache)
        self.rows = wanted

    def reorder(self, rows: list[int]) -> None:
        self.rows, self.skipped = [self.rows[row] for row in rows], [self.skipped[row] for row in rows]
        self.writers = [copy.copy(self.writers[row]) for row in rows]


class _Same:
    """Under ``identity`` the sharer reads the receiver's ids."""

    def next(self, token: int) -> tuple[int, list[int]]:
        return 0, [token]


@dataclass
class _Reencoder:
    """Under re-encoding the sharer reads one token for each of the receiver's.

    Attributes:
        table: :func:`kvfuse.prompts.reencode.reencoding`.
    """

    table: np.ndarray

    def next(self, token: int) -> tuple[int, list[int]]:
        return 0, [int(self.table[token])]


@dataclass
class _Retokenizer:
    """Under ``span`` the sharer reads its own tokens of the text so far.

    Attributes:
        receiver: Turns the receiver's ids into text.
        sharer: Turns text into the sharer's ids.
        ids: The receiver's last few.
        text: What they say, as far as characters are whole.
        context: The last characters that the sharer has read.
    """

    receiver: PreTrainedTokenizerBase
    sharer: PreTrainedTokenizerBase
    ids: list[int]
    text: str
    context: str

    def next(self, token: int) -> tuple[int, list[int]]:
        """How many of its last ids the sharer must forget, and what to read then."""
        ids = [*self.ids, token]
        text = _text(self.receiver, ids)
        self.ids = ids
        if text.endswith("\ufffd") or len(text) <= len(self.text):  # half a character, or a token without text
            return 0, []
        longer = self.context + text[len(self.text) :]
        before, after = (self.sharer(part, add_special_tokens=False).input_ids for part in (self.context, longer))
        same = next(
            (i for i, (old, new) in enumerate(zip(before, after, strict=False)) if old != new),
            min(len(before), len(after)),
        )
        self.context = longer[-CONTEXT_CHARACTERS:]
        self.ids = ids[-CONTEXT_TOKENS:]
        self.text = _text(self.receiver, self.ids)
        return len(before) - same, after[same:]


def _writer(
    how: str, receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, mine: list[int], theirs: list[int]
) -> Any:
    if how == "identity":
        return _Same()
    if how in REENCODINGS:
        return _Reencoder(reencoding(receiver=receiver, sharer=sharer, strategy=how))
    ids = mine[-CONTEXT_TOKENS:]
    context = sharer.decode(theirs[-CONTEXT_TOKENS:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return _Retokenizer(receiver, sharer, ids, _text(receiver, ids), context)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _unpad(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]


def _one_position(position: Tensor, theirs: list[Tensor]) -> AlignedPrompt:
    """One new receiver position ``(B, 1)`` that reads each sharer's one new position ``(B, 1)``."""
    zeros = torch.zeros_like(position)
    reads = tuple(SharerPrompt(ids=zeros, mask=zeros + 1, positions=one, index=zeros) for one in theirs)
    return AlignedPrompt(ids=zeros, mask=zeros + 1, positions=position, sharers=reads, fuse_mask=zeros == 0)
