"""float32 products on AMD's CPUs, which oneDNN computes in up to a fifth less time than MKL, torch's own choice.

Decided by the processor, not measured, so that the same machine always rounds alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ROWS, WEIGHTS = 32, 2**18  # of ``x``, and of a matrix: fewer take as long either way


@contextmanager
def onednn_linears(rows: int) -> Iterator[None]:
    """Within it, linear layers of any model multiply by :func:`linear`, in this thread; not for fewer rows than are worth it."""
    if rows < ROWS or not onednn_is_faster():
        yield
        return
    with _LinearLayers():
        yield


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` but for rounding: ``(…, in)``, ``(out, in)`` and ``(out,)`` to ``(…, out)``; itself where the layer learns."""
    if not (onednn_is_faster() and _is_worth_it(x, weight)) or _is_learnt(weight, bias):
        return F.linear(x, weight, bias)
    return _Frozen.apply(x, weight, bias)


def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.bmm`` but for rounding, one group at a time: ``(1, N, K)`` and ``(1, K, M)`` to ``(1, N, M)``; without a gradient."""
    if len(a) > 1 or not (onednn_is_faster() and _is_worth_it(a, b)):
        return torch.bmm(a, b, out=out)
    product = linear(a[0], b[0].mT)[None]
    return product if out is None else out.copy_(product)


@cache
def onednn_is_faster() -> bool:
    """Whether this is a processor of AMD, and torch has oneDNN's product, which has no public name."""
    able = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return able and "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")


def _is_worth_it(x: Tensor, weight: Tensor) -> bool:
    """Whether both are plain large matrices of float32 on a CPU."""
    large = weight.numel() >= WEIGHTS and x.numel() >= ROWS * x.shape[-1]
    if not large or {x.device.type, weight.device.type} != {"cpu"} or {x.dtype, weight.dtype} != {torch.float32}:
        return False
    return weight.layout == torch.strided and not torch.is_autocast_enabled("cpu")


def _is_learnt(*parameters: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in parameters)


class _Frozen(torch.autograd.Function):
    """A linear layer that has no gradients of its own, but hands on its input's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """torch's hook."""
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """torch's hook."""
        return linear(gradient, ctx.saved_tensors[0].mT), None, None


class _LinearLayers(TorchFunctionMode):
    """Puts :func:`linear` in place of ``F.linear``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (linear if func is F.linear else func)(*args, **(kwargs or {}))
