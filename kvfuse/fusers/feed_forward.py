"""A residual feed-forward block per group, with a backward pass of its own that keeps two tensors where autograd keeps six.

What is cheap is computed again from its input and from what the first product gave; large blocks run group by group on a CPU, so
that all but the products stays in its cache.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kvfuse.fusers.lanes import CACHED_BYTES


class FeedForward(torch.autograd.Function):
    """``x + dropout(gelu(norm(x) @ w1) @ w2)`` with ``norm(x) = x * rsqrt(mean(x^2) + eps) * scale``.

    ``x`` is ``(G, N, C)``, ``scale`` ``(G, 1, C)``, ``w1`` ``(G, C, I)``, ``w2`` ``(G, I, C)``, all of one floating dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, w1: Tensor, w2: Tensor, dropout: float, eps: float, keep: bool = True) -> Tensor:
        """torch's hook; what is kept are ``x``, a ``(G, N, C)`` bool, and if :obj:`keep` the first product ``(G, N, I)``."""
        out, inner = torch.empty_like(x), x.new_empty(*x.shape[:2], w1.shape[2]) if keep else None
        kept = torch.empty(x.shape if dropout else (len(x), 0), dtype=torch.bool, device=x.device)
        for some in _at_once(x):
            product = torch.bmm(_normed(x[some], eps)[0] * scale[some], w1[some])
            added = torch.bmm(F.gelu(product), w2[some])
            if inner is not None:
                inner[some] = product
            if dropout:
                added *= kept[some].bernoulli_(1 - dropout)
            torch.add(x[some], added, alpha=1 / (1 - dropout), out=out[some])
        ctx.save_for_backward(x, scale, w1, w2, inner, kept)
        ctx.dropout, ctx.eps = dropout, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """torch's hook: gradients of ``x``, ``scale``, ``w1`` and ``w2``."""
        x, scale, w1, w2, inner, kept = ctx.saved_tensors
        of_x, of_scale, of_w1, of_w2 = map(torch.empty_like, (x, scale, w1, w2))
        for some in _at_once(x):
            product = torch.bmm(_normed(x[some], ctx.eps)[0] * scale[some], w1[some]) if inner is None else inner[some]
            added = (gradient[some] * kept[some]).div_(1 - ctx.dropout) if ctx.dropout else gradient[some]
            torch.bmm(F.gelu(product).mT, added, out=of_w2[some])
            of_inner = torch.bmm(added, w2[some].mT)
            del added  # what is alive at one time decides how large a batch may be
            torch.ops.aten.gelu_backward.grad_input(of_inner, product, grad_input=of_inner)
            del product
            normed, size = _normed(x[some], ctx.eps)
            torch.bmm((normed * scale[some]).mT, of_inner, out=of_w1[some])
            of_normed = torch.bmm(of_inner, w1[some].mT)
            del of_inner
            torch.sum(of_normed * normed, dim=1, keepdim=True, out=of_scale[some])
            of_normed *= scale[some]
            of_normed -= normed.mul_((of_normed * normed).mean(-1, keepdim=True))
            torch.addcmul(gradient[some], of_normed, size, out=of_x[some])
            del normed, of_normed
        return of_x, of_scale, of_w1, of_w2, None, None, None


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` at a root mean square of one, and what it was multiplied by ``(…, 1)``."""
    size = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * size, size


def _at_once(x: Tensor) -> list[slice]:
    """Which groups to compute at a time."""
    step = 1 if x.device.type == "cpu" and x.nbytes > CACHED_BYTES else len(x)
    return [slice(first, first + step) for first in range(0, len(x), step)]
