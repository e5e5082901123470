"""Fused cache = receiver's cache + what the fusers make of the sharers' caches, at the aligned positions."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kvfuse.kv_cache import KV
from kvfuse.rotation import Rotation, Turn
from kvfuse.token_alignment import AlignedPrompt

FUSIONS = ("parallel", "sequential")


Rotations = Sequence[tuple[Rotation, Rotation] | None]
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
    turn: Turn | None


def pick(receiver: KV, sharer: KV, prompt: AlignedPrompt, place: int, weight: Tensor, rotations: Rotations = ()) -> Picked | None:
    """The aligned tokens of a receiver and its ``place``-th sharer, on the device and in the dtype of ``weight``; None: no token."""
    reads = prompt.sharers[place]
    rows, positions = (prompt.fuse_mask & (reads.index >= 0)).nonzero(as_tuple=True)
    if not len(rows):
        return None
    theirs = reads.index[rows, positions]
    picked = receiver.tokens(rows, positions), sharer.tokens(rows, theirs)
    turns = rotations[place] if rotations else None
    mine, other = (kv.to(weight.device, weight.dtype) for kv in picked)
    if turns is None:
        return Picked(rows, positions, mine, other, None)
    turn = turns[0].at(prompt.positions, rows, positions, receiver.key.dtype)
    return Picked(rows, positions, turn.back(mine), turns[1].at(reads.positions, rows, theirs, sharer.key.dtype).back(other), turn)


def fuse(
    receiver: KV,
    sharers: Sequence[KV],
    fusers: Sequence[nn.Module],
    prompt: AlignedPrompt,
    fusion: str = "parallel",
    rotations: Rotations = (),
) -> KV:
    """Add to the receiver's cache what each sharer's fuser makes of it (paper, Eq. 3).

    Args:
        receiver: ``(L_r, B, H_r, T - 1, D_r)``: all prompt positions but the last.
        sharers: ``(L_s, B, H_s, T_s, D_s)`` each.
        fusers: One per sharer, see :class:`kvfuse.fusers.Fuser`; possibly wrapped.
        prompt: Which receiver position reads which sharer position.
        fusion: ``parallel``: every fuser reads the clean receiver cache; ``sequential``: what the sharers before have
            made of it.
        rotations: By default none. A rotation is linear, so the residual alone is turned forward again, and what it is
            added to stays as it is to the bit where a gate is closed.

    Returns:
        ``(L_r, B, H_r, T - 1, D_r)`` in the receiver's dtype; equal to ``receiver`` where nothing is fused.
    """
    fused = receiver
    for place, (sharer, fuser) in enumerate(zip(sharers, fusers, strict=False)):  # fewer sharers may take part
        weight = next(fuser.parameters())  # a fuser wrapped for distributed training tells neither device nor dtype
        picked = pick(receiver if fusion == "parallel" else fused, sharer, prompt, place, weight, rotations)
        if picked is not None:
            residual = fuser(picked.receiver, picked.sharer)
            residual = residual if picked.turn is None else picked.turn.forward(residual)
            fused = fused.add_tokens(picked.rows, picked.positions, residual)
    return fused
