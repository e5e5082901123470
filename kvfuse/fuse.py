"""Fused cache = receiver's cache + what the fusers make of the sharers' caches, at the aligned positions."""

from collections.abc import Sequence

from torch import nn

from kvfuse.kv_cache import KV
from kvfuse.token_alignment import AlignedPrompt

FUSIONS = ("parallel", "sequential")


def fuse(receiver: KV, sharers: Sequence[KV], fusers: Sequence[nn.Module], prompt: AlignedPrompt, fusion: str = "parallel") -> KV:
    """Add to the receiver's cache what each sharer's fuser makes of it (paper, Eq. 3).

    Args:
        receiver: ``(L_r, B, H_r, T - 1, D_r)``: all prompt positions but the last.
        sharers: ``(L_s, B, H_s, T_s, D_s)`` each.
        fusers: One per sharer, see :class:`kvfuse.fusers.Fuser`; possibly wrapped.
        prompt: Which receiver position reads which sharer position.
        fusion: ``parallel``: every fuser reads the clean receiver cache; ``sequential``: what the sharers before have
            made of it.

    Returns:
        ``(L_r, B, H_r, T - 1, D_r)`` in the receiver's dtype; equal to ``receiver`` where nothing is fused.
    """
    fused = receiver
    for sharer, fuser, reads in zip(sharers, fusers, prompt.sharers, strict=False):  # fewer sharers may take part
        rows, positions = (prompt.fuse_mask & (reads.index >= 0)).nonzero(as_tuple=True)
        if len(rows):
            weight = next(fuser.parameters())  # a fuser wrapped for distributed training tells neither device nor dtype
            base = receiver if fusion == "parallel" else fused
            mine = base.tokens(rows, positions).to(weight.device, weight.dtype)
            theirs = sharer.tokens(rows, reads.index[rows, positions]).to(weight.device, weight.dtype)
            fused = fused.add_tokens(rows, positions, fuser(mine, theirs))
    return fused
