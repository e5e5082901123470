"""A residual feed-forward block per group, with a backward pass of its own that keeps two tensors where autograd keeps six.

What is cheap is computed again from its input and from what the first product gave; large blocks run group by group on a CPU, so
that all but the products stays in its cache. Each product is a function to autograd: the gradient of one large matrix has been
added up, and is gone, before there is the other's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kvfuse.backends.onednn import bmm
from kvfuse.fusers.execution.by_group import fits

DRAWS = 2**16  # of which an element of a dropout mask is one


def feed_forward(
    x: Tensor, scale: Tensor, w1: Tensor, w2: Tensor, dropout: float, eps: float, keep: bool = True
) -> Tensor:
    """``x + dropout(gelu(norm(x) @ w1) @ w2)`` with ``norm(x) = x * rsqrt(mean(x^2) + eps) * scale``.

    Args:
        x: ``(G, N, C)``; all tensors are of one floating dtype.
        scale: ``(G, 1, C)``.
        w1: ``(G, C, I)``.
        w2: ``(G, I, C)``.
        dropout: Share that is left out, rounded to a multiple of one in :data:`DRAWS`; what is kept is scaled up by its share.
        eps: Within the norm.
        keep: Keep the first product for the backward pass, ``(G, N, I)``, beside ``x`` and a ``(G, N, C)`` uint8.
    """
    inner, x = _First.apply(x, scale, w1, eps)
    return _Second.apply(x, inner, scale, w1, w2, round(dropout * DRAWS), eps, keep)


class _First(torch.autograd.Function):
    """``norm(x) @ w1``, and ``x`` as it is, so that both gradients come back to one place and are added up there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, w1: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """torch's hook."""
        inner = x.new_empty(*x.shape[:2], w1.shape[2])
        for some in _at_once(x):
            bmm(_normed(x[some], eps)[0] * scale[some], w1[some], out=inner[some])
        ctx.save_for_backward(x, scale, w1)
        ctx.eps = eps
        return inner, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_inner: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """torch's hook: gradients of ``x``, ``scale`` and ``w1``."""
        x, scale, w1 = ctx.saved_tensors
        of_x, of_scale, of_w1 = map(torch.empty_like, (x, scale, w1))
        for some in _at_once(x):
            normed, size = _normed(x[some], ctx.eps)
            torch.bmm((normed * scale[some]).mT, of_inner[some], out=of_w1[some])
            of_normed = bmm(of_inner[some], w1[some].mT)
            torch.sum(of_normed * normed, dim=1, keepdim=True, out=of_scale[some])
            of_normed *= scale[some]
            of_normed -= normed.mul_((of_normed * normed).mean(-1, keepdim=True))
            torch.addcmul(gradient[some], of_normed, size, out=of_x[some])
            del normed, of_normed  # what is alive at one time decides how large a batch may be
        return of_x, of_scale, of_w1, None


class _Second(torch.autograd.Function):
    """``x + dropout(gelu(inner) @ w2)``; ``inner`` is computed again from what the first had where it is not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inner: Tensor, scale: Tensor, w1: Tensor, w2: Tensor, left_out: int, eps: float, keep: bool
    ) -> Tensor:
        """torch's hook; ``left_out`` of :data:`DRAWS` are."""
        out, kept = (
            torch.empty_like(x),
            torch.empty(x.shape if left_out else (len(x), 0), dtype=torch.uint8, device=x.device),
        )
        ctx.eps, ctx.scale_up = eps, DRAWS / (DRAWS - left_out)
        for some in _at_once(x):
            added = bmm(F.gelu(inner[some]), w2[some])
            if left_out:
                added *= _draw(kept[some], left_out)
            torch.add(x[some], added, alpha=ctx.scale_up, out=out[some])
        ctx.save_for_backward(w2, kept, *((inner, None, None, None) if keep else (None, x, scale, w1)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """torch's hook: gradients of ``x``, ``inner`` and ``w2``."""
        w2, kept, inner, x, scale, w1 = ctx.saved_tensors
        of_w2, of_inner = torch.empty_like(w2), gradient.new_empty(*gradient.shape[:2], w2.shape[1])
        for some in _at_once(gradient):
            product = bmm(_normed(x[some], ctx.eps)[0] * scale[some], w1[some]) if inner is None else inner[some]
            added = (gradient[some] * kept[some]).mul_(ctx.scale_up) if kept.numel() else gradient[some]
            torch.bmm(F.gelu(product).mT, added, out=of_w2[some])
            of_gelu = bmm(added, w2[some].mT)
            torch.ops.aten.gelu_backward.grad_input(of_gelu, product, grad_input=of_inner[some])
            del product, added, of_gelu
        return gradient, of_inner, None, None, of_w2, None, None, None


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` at a root mean square of one, and what it was multiplied by ``(…, 1)``."""
    size = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * size, size


def _draw(kept: Tensor, left_out: int) -> Tensor:
    """Write a mask over a contiguous uint8: zeros at ``left_out`` of :data:`DRAWS`, else ones.

    Four draws are one of torch's 64 random bits, and bytes are multiplied as they are: a fifth of the time of a bool's ``bernoulli_``.
    """
    bits = torch.empty(-(-kept.numel() // 4), dtype=torch.int64, device=kept.device).random_(-(2**63), None)
    draws = bits.view(torch.int16)[: kept.numel()].view_as(kept)
    return torch.ge(draws, left_out - DRAWS // 2, out=kept)


def _at_once(x: Tensor) -> list[slice]:
    """Which groups to compute at a time."""
    step = len(x) if fits(x.device, x.nbytes) else 1
    return [slice(first, first + step) for first in range(0, len(x), step)]
