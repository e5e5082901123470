"""Fused cache = the receiver's cache + what the fusers make of the sharers' caches, at the aligned positions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kvfuse.cache.kv import KV
from kvfuse.prompts.alignment import AlignedPrompt
from kvfuse.stages.rope import RoPE, TokenRoPE

FUSIONS = ("parallel", "sequential")
TOKENS_PER_CHUNK = 1024
"""Tokens fused at once at inference: more take more memory, fewer read the weights of a fuser more often."""

RoPEs = Sequence[tuple[RoPE, RoPE] | None]
"""For each sharer the receiver's RoPE and its own, or None where the fuser sees keys as the caches hold them."""


@dataclass(frozen=True)
class SelectedTokens:
    """The tokens that one fuser sees.

    Attributes:
        rows: ``(N,)`` int64, the batch row of each.
        positions: ``(N,)`` int64, its position in the receiver's cache.
        receiver: ``(L_r, 1, H_r, N, D_r)``.
        sharer: ``(L_s, 1, H_s, N, D_s)``.
        rope: That of the receiver's keys, where it was removed from both.
    """

    rows: Tensor
    positions: Tensor
    receiver: KV
    sharer: KV
    rope: TokenRoPE | None


def fuse(
    *,
    receiver: KV,
    sharers: Sequence[KV],
    fusers: Sequence[nn.Module],
    prompt: AlignedPrompt,
    fusion: str = "parallel",
    ropes: RoPEs = (),
    consume: bool = False,
) -> KV:
    """Add to the receiver's cache what each sharer's fuser makes of it (paper, Eq. 3).

    Without gradients it is done :data:`TOKENS_PER_CHUNK` tokens at a time, so that memory does not grow with the
    prompt.

    Args:
        receiver: ``(L_r, B, H_r, T - 1, D_r)``: all prompt positions but the last.
        sharers: ``(L_s, B, H_s, T_s, D_s)`` each.
        fusers: One per sharer, see :class:`kvfuse.fusers.Fuser`; possibly wrapped.
        prompt: Which receiver position reads which sharer position.
        fusion: ``parallel``: every fuser reads the clean receiver cache; ``sequential``: the one that the sharers
            before have changed.
        ropes: By default none is removed. The rotation is linear, so it is applied to the residual only, and the cache
            stays as it is, to the bit, where a gate is closed.
        consume: Whether ``receiver`` may be overwritten; without gradients only.

    Returns:
        ``(L_r, B, H_r, T - 1, D_r)`` in the receiver's dtype; equal to ``receiver`` where nothing is fused.
    """
    differentiable = torch.is_grad_enabled()
    fused = receiver if differentiable or consume else receiver.clone()
    indices = range(min(len(sharers), len(fusers)))  # fewer sharers may take part
    for chunk in [prompt] if differentiable else _chunks(prompt):
        for group in [indices] if fusion == "parallel" else [[index] for index in indices]:
            # All residuals of a group are computed before the first is added.
            residuals = [_residual(fused, sharers[index], fusers[index], chunk, index, ropes) for index in group]
            for rows, positions, residual in filter(None, residuals):
                add = fused.add_tokens if differentiable else fused.add_tokens_
                fused = add(rows, positions, residual)
    return fused


def select_tokens(
    *, receiver: KV, sharer: KV, prompt: AlignedPrompt, index: int, like: Tensor, ropes: RoPEs = ()
) -> SelectedTokens | None:
    """The aligned tokens of a receiver and one of its sharers.

    Args:
        receiver: ``(L_r, B, H_r, T, D_r)``.
        sharer: ``(L_s, B, H_s, T_s, D_s)``.
        prompt: How they are aligned.
        index: Which sharer of the prompt it is.
        like: Gives the device and dtype of the result.
        ropes: See :func:`fuse`.

    Returns:
        None if no token is fused.
    """
    reads = prompt.sharers[index]
    rows, positions = (prompt.fuse_mask & (reads.index >= 0)).nonzero(as_tuple=True)
    if not len(rows):
        return None
    columns = reads.index[rows, positions]
    receiver_tokens = receiver.tokens(rows, positions).to(like.device, like.dtype)
    sharer_tokens = sharer.tokens(rows, columns).to(like.device, like.dtype)
    pair = ropes[index] if ropes else None
    if pair is None:
        return SelectedTokens(rows, positions, receiver_tokens, sharer_tokens, None)
    receiver_rope = pair[0].at(prompt.positions, rows, positions, receiver.key.dtype)
    sharer_rope = pair[1].at(reads.positions, rows, columns, sharer.key.dtype)
    removed = receiver_rope.remove(receiver_tokens), sharer_rope.remove(sharer_tokens)
    return SelectedTokens(rows, positions, *removed, receiver_rope)


def _residual(
    receiver: KV, sharer: KV, fuser: nn.Module, prompt: AlignedPrompt, index: int, ropes: RoPEs
) -> tuple[Tensor, Tensor, KV] | None:
    """Rows and positions of the tokens that one fuser sees, and what it adds to them."""
    like = next(fuser.parameters())  # a fuser wrapped for distributed training has neither device nor dtype
    tokens = select_tokens(receiver=receiver, sharer=sharer, prompt=prompt, index=index, like=like, ropes=ropes)
    if tokens is None:
        return None
    residual = fuser(receiver=tokens.receiver, sharer=tokens.sharer)
    return tokens.rows, tokens.positions, residual if tokens.rope is None else tokens.rope.apply(residual)


def _chunks(prompt: AlignedPrompt) -> Iterator[AlignedPrompt]:
    """The prompt with a part of its fused positions at a time."""
    positions = prompt.fuse_mask.nonzero()
    if len(positions) <= TOKENS_PER_CHUNK:
        yield prompt
        return
    for chunk in positions.split(TOKENS_PER_CHUNK):
        fuse_mask = torch.zeros_like(prompt.fuse_mask)
        fuse_mask[chunk[:, 0], chunk[:, 1]] = True
        yield replace(prompt, fuse_mask=fuse_mask)
