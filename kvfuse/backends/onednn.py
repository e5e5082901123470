"""float32 products by oneDNN on AMD's CPUs, which takes up to a fifth less time than MKL, torch's own choice.

The processor decides, not a measurement, so that one machine always rounds alike.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MIN_ROWS, MIN_WEIGHTS = 32, 2**18  # smaller products take as long either way


def onednn_linears(rows: int) -> AbstractContextManager[Any]:
    """Within it, linear layers of any model run in this thread go through :func:`linear`, if there are enough rows."""
    return _LinearMode() if rows >= MIN_ROWS and onednn_is_faster() else nullcontext()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` up to rounding; exactly ``F.linear`` if the layer trains.

    Args:
        x: ``(…, in)``.
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.

    Returns:
        ``(…, out)``.
    """
    if not (onednn_is_faster() and _is_large(x, weight)) or _trains(weight, bias):
        return F.linear(x, weight, bias)
    return _FrozenLinear.apply(x, weight, bias)


def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``torch.bmm`` up to rounding, without a gradient: ``(G, N, K)`` and ``(G, K, M)`` to ``(G, N, M)``."""
    if len(a) > 1 or not (onednn_is_faster() and _is_large(a, b)):
        return torch.bmm(a, b, out=out)
    product = linear(a[0], b[0].mT)[None]
    return product if out is None else out.copy_(product)


@cache
def onednn_is_faster() -> bool:
    """Whether this is a processor of AMD and torch has oneDNN's product, which has no public name."""
    able = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return able and "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")


def _is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether both are dense float32 on a CPU, and large enough."""
    if weight.numel() < MIN_WEIGHTS or x.numel() < MIN_ROWS * x.shape[-1]:
        return False
    if {x.device.type, weight.device.type} != {"cpu"} or {x.dtype, weight.dtype} != {torch.float32}:
        return False
    return weight.layout == torch.strided and not torch.is_autocast_enabled("cpu")


def _trains(*parameters: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in parameters)


class _FrozenLinear(torch.autograd.Function):
    """A linear layer without gradients of its own, which passes its input's on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Called by torch."""
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Called by torch."""
        return linear(gradient, ctx.saved_tensors[0].mT), None, None


class _LinearMode(TorchFunctionMode):
    """Replaces ``F.linear`` by :func:`linear`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (linear if func is F.linear else func)(*args, **(kwargs or {}))
