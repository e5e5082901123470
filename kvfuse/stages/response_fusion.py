"""Fuse the response too: every model reads it along, and each new position is fused as it comes.

The receiver reads a new token into a clean cache, the sharers read it as well, and the fused keys and values replace
those that the receiver computes when it decodes. A sharer with another tokenizer reads its own tokens of the text so
far; where a new piece changes the tokens before it, the sharer takes the last ones back and reads them again.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvfuse.backends.offloading import input_device
from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import keep_rows, read_cache, stage
from kvfuse.prompts.alignment import AlignedPrompt, SharerPrompt, count_positions, pad_left
from kvfuse.prompts.response_tokens import ResponseTokens
from kvfuse.stages.prefill import ModelCaches, prefill

Fuse = Callable[..., KV]
"""Fuses positions, called with ``prompt``, ``receiver`` and ``sharers`` (:func:`kvfuse.stages.fuse.fuse`)."""


@dataclass(frozen=True)
class TailKV:
    """Keys and values of responses, each with the last token of its prompt before it, as the models read them.

    Attributes:
        receiver: ``(L_r, B, H_r, 1 + R, D_r)``, padded right.
        sharers: ``(L_s, B, H_s, 1 + R_s, D_s)`` each, padded right.
    """

    receiver: KV
    sharers: tuple[KV, ...]


class ResponseFuser:
    """Reads responses with every model and fuses their positions: at once, or token by token.

    Args:
        receiver: The model that answers.
        sharers: The models that only read.
        prompt: The prompt that all of them have read.
        caches: Their caches of it, which are extended.
        tokens: For each sharer what makes the :class:`ResponseTokens` of a row, of ``receiver_ids`` and the ``text``
            that the sharer reads.
        fuse: See :data:`Fuse`.
    """

    def __init__(
        self,
        *,
        receiver: PreTrainedModel,
        sharers: Sequence[PreTrainedModel],
        prompt: AlignedPrompt,
        caches: ModelCaches,
        tokens: Sequence[Callable[..., ResponseTokens]],
        fuse: Fuse,
    ) -> None:
        self.receiver, self.cache, self.fuse = receiver, caches.receiver, fuse
        self.mask = prompt.mask[:, :-1]  # (B, T - 1), of the receiver's cache
        self.position = prompt.positions[:, -1:]  # (B, 1), of the token to read next
        rows = _unpad(prompt.ids, prompt.mask)
        columns = zip(sharers, caches.sharers, prompt.sharers, tokens, strict=True)
        self.sharers = [_SharerReader(model, cache, reads, rows, make) for model, cache, reads, make in columns]
        self.started = False

    def read(self, tail: AlignedPrompt) -> TailKV:
        """Read whole responses at once, with every model.

        Args:
            tail: ``(B, k)``: the last prompt token and the response, padded right. A sharer's part begins with its last
                prompt token, which it has read.
        """
        mask = torch.cat([self.mask, tail.mask], dim=1)
        prefill(self.receiver, tail.ids, mask, tail.positions, self.cache)
        for sharer, reads in zip(self.sharers, tail.sharers, strict=True):
            mask = torch.cat([sharer.mask, reads.mask[:, 1:]], dim=1)
            prefill(sharer.model, reads.ids[:, 1:], mask, reads.positions[:, 1:], sharer.cache)
        lengths = [reads.ids.shape[1] for reads in tail.sharers]
        sharers = [read_cache(sharer.cache, last=length) for sharer, length in zip(self.sharers, lengths, strict=True)]
        return TailKV(read_cache(self.cache, last=tail.ids.shape[1]), tuple(sharers))

    def prefill(self, tail: AlignedPrompt, known: TailKV | None = None) -> KV:
        """Fuse whole responses at once.

        Args:
            tail: See :meth:`read`.
            known: What :meth:`read` gave for it; by default it is read.

        Returns:
            Fused keys and values of the tail, ``(L, B, H, k, D)``.
        """
        read = self.read(tail) if known is None else known
        return self.fuse(prompt=tail, receiver=read.receiver, sharers=read.sharers)

    def step(self, ids: Tensor, mask: Tensor) -> KV:
        """Read one new token per row.

        Args:
            ids: ``(B, 1)`` int64, the receiver's; the first is the last prompt token, which the sharers have read.
            mask: ``(B, n + 1)``: the ``n`` positions before it and itself.

        Returns:
            Its fused keys and values, ``(L, B, H, 1, D)``.
        """
        prefill(self.receiver, ids, mask.cpu(), self.position, self.cache)
        if self.started:
            for sharer in self.sharers:
                sharer.read(ids[:, 0].tolist())
        self.started = True
        sharers = [read_cache(sharer.cache, last=1) for sharer in self.sharers]
        prompt = _one_position(self.position, [sharer.last_position for sharer in self.sharers])
        self.position = self.position + 1
        return self.fuse(prompt=prompt, receiver=read_cache(self.cache, last=1), sharers=sharers)

    def feed(self, cache: Cache, ids: Tensor, mask: Tensor) -> None:
        """Read a token per row, so that it is fused in the receiver's ``cache`` when the model reads it next."""
        stage(cache, self.step(ids, mask))

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows, repeated or left out, as beams are."""
        for model, cache in ((self.receiver, self.cache), *((sharer.model, sharer.cache) for sharer in self.sharers)):
            cache.reorder_cache(rows.to(input_device(model)))
        self.mask, self.position = self.mask[rows.cpu()], self.position[rows.cpu()]
        for sharer in self.sharers:
            sharer.reorder(rows.cpu())


@dataclass
class FusedPrompt:
    """The receiver's fused cache of a batch of prompts.

    Attributes:
        cache: All positions but the last; None for prompts of one token, where nothing is fused.
        response_fuser: Fuses the last prompt token and the response, where the fusers were trained to.
    """

    cache: Cache | None
    response_fuser: ResponseFuser | None = None

    def repeat(self, rows: Tensor) -> None:
        """Go on with these rows ``(n,)`` int64 of the batch, repeated or left out."""
        if self.cache is not None:
            self.cache.reorder_cache(rows.to(self.cache.layers[-1].keys.device))
        if self.response_fuser is not None:
            self.response_fuser.reorder(rows)

    def stage(self, tail: AlignedPrompt, known: TailKV | None = None) -> None:
        """Read responses ``(B, 1 + R)`` with every model, unless it is known what they read: they are fused when the
        receiver reads them next."""
        if self.cache is not None and self.response_fuser is not None:
            stage(self.cache, self.response_fuser.prefill(tail, known))


class _SharerReader:
    """One sharer with its cache, and for each row the ids in it.

    Attributes:
        mask: ``(B, T_s)``, of the prompt.
        skipped: Number of positions that each row's prompt leaves out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        prompt: SharerPrompt,
        receiver_rows: list[list[int]],
        make_tokens: Callable[..., ResponseTokens],
    ) -> None:
        self.model, self.cache, self.mask = model, cache, prompt.mask
        self.rows = _unpad(prompt.ids, prompt.mask)
        last = prompt.positions[:, -1].tolist()
        self.skipped = [position + 1 - len(row) for position, row in zip(last, self.rows, strict=True)]
        texts = [None] * len(self.rows) if prompt.texts is None else list(prompt.texts)
        self._prompts = list(zip(receiver_rows, texts, strict=True))
        self._make_tokens = make_tokens
        self._tokens: list[ResponseTokens] = []

    @property
    def last_position(self) -> Tensor:
        """``(B, 1)`` int64: the position of each row's last token."""
        return torch.tensor([[len(row) + skipped - 1] for row, skipped in zip(self.rows, self.skipped, strict=True)])

    def read(self, receiver_tokens: list[int]) -> None:
        """Read the sharer's tokens of what the receiver has just written.

        Every row is fed the same number of tokens, those it lacks and before them some that it knows already: so all
        rows end in the last column and need no padding within.
        """
        # 1) The ids that each row should hold.
        if not self._tokens:
            self._tokens = [self._make_tokens(receiver_ids=ids, text=text) for ids, text in self._prompts]
        changes = [tokens.next(token) for tokens, token in zip(self._tokens, receiver_tokens, strict=True)]
        feed = max(len(added) for _, added in changes)
        if feed == 0:
            return
        wanted = [row[: len(row) - removed] + added for row, (removed, added) in zip(self.rows, changes, strict=True)]
        # 2) Take back what differs, and as much more as makes all rows lack equally many.
        held, kept = [len(row) for row in self.rows], [max(len(row) - feed, 0) for row in wanted]
        if kept != held:
            keep_rows(self.cache, kept, held)
        # 3) Read the rest.
        ids, mask = pad_left([np.array(row[keep:], dtype=np.int64) for row, keep in zip(wanted, kept, strict=True)], 0)
        _, before = pad_left([np.zeros(keep, dtype=np.int64) for keep in kept], 0)
        mask = torch.cat([before, mask], dim=1)
        positions = (count_positions(mask) + torch.tensor(self.skipped)[:, None])[:, -ids.shape[1] :]
        prefill(self.model, ids, mask, positions, self.cache)
        self.rows = wanted

    def reorder(self, rows: Tensor) -> None:
        """See :meth:`ResponseFuser.reorder`; the caches are reordered already."""
        self.mask = self.mask[rows]
        for name in ("rows", "skipped", "_prompts"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows.tolist()])
        if self._tokens:
            self._tokens = [copy.copy(self._tokens[row]) for row in rows.tolist()]


def _unpad(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]


def _one_position(position: Tensor, sharer_positions: list[Tensor]) -> AlignedPrompt:
    """One new receiver position ``(B, 1)`` that reads the one new position ``(B, 1)`` of each sharer."""
    zeros = torch.zeros_like(position)
    sharers = tuple(SharerPrompt(ids=zeros, mask=zeros + 1, positions=one, index=zeros) for one in sharer_positions)
    return AlignedPrompt(ids=zeros, mask=zeros + 1, positions=position, sharers=sharers, fuse_mask=zeros == 0)
