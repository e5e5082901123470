"""Fused cache = receiver's cache + what the fusers make of the sharers' caches, at the aligned positions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kvfuse.cache.transformers_cache import KV
from kvfuse.prompts.alignment import AlignedPrompt
from kvfuse.stages.rope import RoPE, TokenRoPE

FUSIONS = ("parallel", "sequential")
TOKENS = 1024  # fused at once at inference: more would want more memory, fewer would read a fuser's weights more often

RoPEs = Sequence[tuple[RoPE, RoPE] | None]
"""For each sharer the receiver's rotation and its own, or None where the fuser sees keys as the caches hold them."""


@dataclass(frozen=True)
class Picked:
    """The tokens that one fuser sees.

    Attributes:
        rows: ``(N,)`` int64, the batch row of each.
        positions: ``(N,)`` int64, its position in the receiver's cache.
        receiver: ``(L_r, 1, H_r, N, D_r)``.
        sharer: ``(L_s, 1, H_s, N, D_s)``.
        turn: Of the receiver's keys, where both caches' keys are turned back to position zero.
    """

    rows: Tensor
    positions: Tensor
    receiver: KV
    sharer: KV
    turn: TokenRoPE | None


def pick(
    receiver: KV, sharer: KV, prompt: AlignedPrompt, place: int, weight: Tensor, ropes: RoPEs = ()
) -> Picked | None:
    """The aligned tokens of a receiver and its ``place``-th sharer, on the device and in the dtype of ``weight``; None: no token."""
    reads = prompt.sharers[place]
    rows, positions = (prompt.fuse_mask & (reads.index >= 0)).nonzero(as_tuple=True)
    if not len(rows):
        return None
    theirs = reads.index[rows, positions]
    picked = receiver.tokens(rows, positions), sharer.tokens(rows, theirs)
    turns = ropes[place] if ropes else None
    mine, other = (kv.to(weight.device, weight.dtype) for kv in picked)
    if turns is None:
        return Picked(rows, positions, mine, other, None)
    turn = turns[0].at(prompt.positions, rows, positions, receiver.key.dtype)
    return Picked(
        rows,
        positions,
        turn.remove(mine),
        turns[1].at(reads.positions, rows, theirs, sharer.key.dtype).remove(other),
        turn,
    )


def fuse(
    receiver: KV,
    sharers: Sequence[KV],
    fusers: Sequence[nn.Module],
    prompt: AlignedPrompt,
    fusion: str = "parallel",
    ropes: RoPEs = (),
    in_place: bool = False,
) -> KV:
    """Add to the receiver's cache what each sharer's fuser makes of it (paper, Eq. 3).

    Without gradients it is done :data:`TOKENS` at a time, so that what is alive meanwhile does not grow with the prompt.

    Args:
        receiver: ``(L_r, B, H_r, T - 1, D_r)``: all prompt positions but the last.
        sharers: ``(L_s, B, H_s, T_s, D_s)`` each.
        fusers: One per sharer, see :class:`kvfuse.fusers.Fuser`; possibly wrapped.
        prompt: Which receiver position reads which sharer position.
        fusion: ``parallel``: every fuser reads the clean receiver cache; ``sequential``: what the sharers before have
            made of it.
        ropes: By default none. A rotation is linear, so the residual alone is turned forward again, and what it is
            added to stays as it is to the bit where a gate is closed.
        in_place: Write over ``receiver``; without gradients only.

    Returns:
        ``(L_r, B, H_r, T - 1, D_r)`` in the receiver's dtype; equal to ``receiver`` where nothing is fused.
    """
    differentiable = torch.is_grad_enabled()
    fused = receiver if differentiable or in_place else receiver.clone()
    places = range(min(len(sharers), len(fusers)))  # fewer sharers may take part
    for piece in [prompt] if differentiable else _pieces(prompt):
        for together in [places] if fusion == "parallel" else [[place] for place in places]:
            added = [_residual(fused, sharers[place], fusers[place], piece, place, ropes) for place in together]
            for one in filter(None, added):
                fused = fused.add_tokens(*one) if differentiable else fused.add_tokens_(*one)
    return fused


def _residual(
    receiver: KV, sharer: KV, fuser: nn.Module, prompt: AlignedPrompt, place: int, ropes: RoPEs
) -> tuple[Tensor, Tensor, KV] | None:
    """Rows and positions of the tokens that one fuser sees, and what it adds to them."""
    weight = next(fuser.parameters())  # a fuser wrapped for distributed training tells neither device nor dtype
    picked = pick(receiver, sharer, prompt, place, weight, ropes)
    if picked is None:
        return None
    residual = fuser(picked.receiver, picked.sharer)
    return picked.rows, picked.positions, residual if picked.turn is None else picked.turn.apply(residual)


def _pieces(prompt: AlignedPrompt) -> Iterator[AlignedPrompt]:
    """The prompt with some of its fused positions after others."""
    positions = prompt.fuse_mask.nonzero()
    if len(positions) <= TOKENS:
        yield prompt
        return
    for some in positions.split(TOKENS):
        fuse_mask = torch.zeros_like(prompt.fuse_mask)
        fuse_mask[some[:, 0], some[:, 1]] = True
        yield replace(prompt, fuse_mask=fuse_mask)
