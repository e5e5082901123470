"""A residual feed-forward block per group whose backward pass keeps two tensors where autograd keeps six.

What is cheap is computed again, from the block's input and its first product. On a CPU large blocks run group by group,
so that everything but the products stays in the processor's cache. Each of the two products is a function to autograd:
the gradient of one large matrix is added up and freed before the other's is made.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kvfuse.backends.onednn import bmm

CACHE_BYTES = 2**21  # of one tensor of all groups: several of them are alive at a time, in a CPU's cache
DROPOUT_LEVELS = 2**16  # a dropout probability is rounded to a multiple of 1 / DROPOUT_LEVELS


def fits_in_cache(device: torch.device, nbytes: int) -> bool:
    """Whether a tensor of all groups is best computed at once: on a CPU only if it stays in the cache."""
    return device.type != "cpu" or nbytes <= CACHE_BYTES


def feed_forward(
    x: Tensor, scale: Tensor, w1: Tensor, w2: Tensor, *, dropout: float, eps: float, keep: bool = True
) -> Tensor:
    """``x + dropout(gelu(norm(x) @ w1) @ w2)`` with ``norm(x) = x * rsqrt(mean(x^2) + eps) * scale``.

    Args:
        x: ``(G, N, C)``; all tensors have one floating dtype.
        scale: ``(G, 1, C)``.
        w1: ``(G, C, I)``.
        w2: ``(G, I, C)``.
        dropout: Probability, rounded to a multiple of ``1 / DROPOUT_LEVELS``.
        eps: Of the norm.
        keep: Keep the first product for the backward pass, ``(G, N, I)``, beside ``x`` and a ``(G, N, C)`` uint8.
    """
    inner, x = _FirstProduct.apply(x, scale, w1, eps)
    return _SecondProduct.apply(x, inner, scale, w1, w2, round(dropout * DROPOUT_LEVELS), eps, keep)


class _FirstProduct(torch.autograd.Function):
    """``norm(x) @ w1``. It also returns ``x``, so that both gradients of ``x`` arrive here and are added in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, w1: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Called by torch."""
        inner = x.new_empty(*x.shape[:2], w1.shape[2])
        for groups in _group_slices(x):
            bmm(_normalise(x[groups], eps)[0] * scale[groups], w1[groups], out=inner[groups])
        ctx.save_for_backward(x, scale, w1)
        ctx.eps = eps
        return inner, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_inner: Tensor, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Called by torch. Returns the gradients of ``x``, ``scale`` and ``w1``."""
        x, scale, w1 = ctx.saved_tensors
        grad_x, grad_scale, grad_w1 = map(torch.empty_like, (x, scale, w1))
        for groups in _group_slices(x):
            # 1) The weight, from the normalised input, which is computed again.
            normed, inverse_rms = _normalise(x[groups], ctx.eps)
            torch.bmm((normed * scale[groups]).mT, grad_inner[groups], out=grad_w1[groups])
            # 2) The scale of the norm.
            grad_normed = bmm(grad_inner[groups], w1[groups].mT)
            torch.sum(grad_normed * normed, dim=1, keepdim=True, out=grad_scale[groups])
            # 3) The input, through the norm and past it (the residual).
            grad_normed *= scale[groups]
            grad_normed -= normed.mul_((grad_normed * normed).mean(-1, keepdim=True))
            torch.addcmul(grad_out[groups], grad_normed, inverse_rms, out=grad_x[groups])
            del normed, grad_normed  # the peak of memory decides how large a batch may be
        return grad_x, grad_scale, grad_w1, None


class _SecondProduct(torch.autograd.Function):
    """``x + dropout(gelu(inner) @ w2)``; ``inner`` is computed again for the backward pass where it is not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inner: Tensor, scale: Tensor, w1: Tensor, w2: Tensor, dropped: int, eps: float, keep: bool
    ) -> Tensor:
        """Called by torch; ``dropped`` of :data:`DROPOUT_LEVELS` levels are dropped."""
        out = torch.empty_like(x)
        mask = torch.empty(x.shape if dropped else (len(x), 0), dtype=torch.uint8, device=x.device)
        ctx.eps, ctx.scale_up = eps, DROPOUT_LEVELS / (DROPOUT_LEVELS - dropped)
        for groups in _group_slices(x):
            added = bmm(F.gelu(inner[groups]), w2[groups])
            if dropped:
                added *= _draw_mask(mask[groups], dropped)
            torch.add(x[groups], added, alpha=ctx.scale_up, out=out[groups])
        ctx.save_for_backward(w2, mask, *((inner, None, None, None) if keep else (None, x, scale, w1)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Called by torch. Returns the gradients of ``x``, ``inner`` and ``w2``."""
        w2, mask, inner, x, scale, w1 = ctx.saved_tensors
        grad_w2, grad_inner = torch.empty_like(w2), grad_out.new_empty(*grad_out.shape[:2], w2.shape[1])
        for groups in _group_slices(grad_out):
            # 1) The first product, kept or computed again.
            if inner is None:
                product = bmm(_normalise(x[groups], ctx.eps)[0] * scale[groups], w1[groups])
            else:
                product = inner[groups]
            # 2) Back through dropout, then the weight.
            added = (grad_out[groups] * mask[groups]).mul_(ctx.scale_up) if mask.numel() else grad_out[groups]
            torch.bmm(F.gelu(product).mT, added, out=grad_w2[groups])
            # 3) Back through the activation.
            grad_gelu = bmm(added, w2[groups].mT)
            torch.ops.aten.gelu_backward.grad_input(grad_gelu, product, grad_input=grad_inner[groups])
            del product, added, grad_gelu
        return grad_out, grad_inner, None, None, grad_w2, None, None, None


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` at a root mean square of one, and the factor that made it so, ``(…, 1)``."""
    inverse_rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * inverse_rms, inverse_rms


def _draw_mask(mask: Tensor, dropped: int) -> Tensor:
    """Fill a contiguous uint8 tensor with zeros at a rate of ``dropped`` in :data:`DROPOUT_LEVELS`, else ones.

    One of torch's 64 random bits serves four draws: a fifth of the time of ``bernoulli_`` on bools.
    """
    bits = torch.empty(-(-mask.numel() // 4), dtype=torch.int64, device=mask.device).random_(-(2**63), None)
    draws = bits.view(torch.int16)[: mask.numel()].view_as(mask)
    return torch.ge(draws, dropped - DROPOUT_LEVELS // 2, out=mask)


def _group_slices(x: Tensor) -> list[slice]:
    """All groups in one slice, or one by one."""
    step = len(x) if fits_in_cache(x.device, x.nbytes) else 1
    return [slice(first, first + step) for first in range(0, len(x), step)]
