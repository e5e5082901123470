"""Frozen weights as they are multiplied quickest: what can be multiplied beforehand is, and the rest laid out for this CPU's products.

A fuser's norms lose their weights to the products behind them. On a CPU, oneDNN's products of weights in a layout of its own take a fifth
less time than torch's own on AMD's processors in float32; on Intel's, MKL is as quick, and nothing is laid out anew.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvfuse.errors import PairError
from kvfuse.fusers.grouped import GroupedFFN, GroupedLinear, GroupedRMSNorm
from kvfuse.fusers.lanes import Grouped

TOKENS = 256  # what the layout is made for; others are multiplied from it too
LAYERS = 16  # measured one after another, as a model's are: none is in the processor's cache
ENOUGH = 0.95  # of the time of torch's own product


class PackedLinear(nn.Module):
    """``nn.Linear`` with a packed weight; a gradient flows to its input."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed, self.bias = _packed(linear.weight), linear.bias

    @property
    def weight(self) -> Tensor:
        """``(out, in)``, made anew each time."""
        return self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(…, in)`` to ``(…, out)``."""
        return F.linear(x, self.weight, self.bias) if x.requires_grad else _product(x, self.packed, self.bias)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise _not_saved()


class PackedGroups(Grouped):
    """``GroupedLinear`` with a packed weight for each group.

    Attributes:
        per_group: See :func:`kvfuse.fusers.lanes.cut`.
    """

    per_group = ("packed",)

    def __init__(self, linear: GroupedLinear) -> None:
        super().__init__()
        self.packed, self.bias = [_packed(weight.T.contiguous()) for weight in linear.weight], linear.bias

    @property
    def weight(self) -> Tensor:
        """``(G, in, out)``, made anew each time."""
        return torch.stack([one.to_dense().T for one in self.packed])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(G, N, in)`` to ``(G, N, out)``."""
        if x.requires_grad:
            return x @ self.weight if self.bias is None else torch.baddbmm(self.bias, x, self.weight)
        biases = [None] * len(x) if self.bias is None else self.bias[:, 0]
        out = [_product(one, packed, bias) for one, packed, bias in zip(x, self.packed, biases, strict=True)]
        return out[0][None] if len(out) == 1 else torch.stack(out)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise _not_saved()


class FoldedRMSNorm(Grouped):
    """``GroupedRMSNorm`` whose weight the next product has."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of ``(G, N, C)``."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise _not_saved()


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Change a frozen model or fuser in place; what is shared with an embedding, or multiplied otherwise, stays as it is."""
    for block in model.modules():
        if isinstance(block, GroupedFFN) and isinstance(block.norm, GroupedRMSNorm) and isinstance(block.w1, GroupedLinear):
            block.w1.weight.mul_(block.norm.weight.mT)  # (G, C, I) * (G, C, 1)
            block.set_submodule("norm", FoldedRMSNorm(block.norm.eps))
    if is_quicker():
        _lay_out(model)


def _lay_out(model: nn.Module) -> None:
    shared = Counter(weight.data_ptr() for _, weight in model.named_parameters(remove_duplicate=False))
    for name, layer in list(model.named_modules()):
        weight = getattr(layer, "weight", None)
        if type(layer) not in (nn.Linear, GroupedLinear) or weight is None or getattr(layer, "folded", False):
            continue
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and shared[weight.data_ptr()] == 1:
            model.set_submodule(name, PackedLinear(layer) if isinstance(layer, nn.Linear) else PackedGroups(layer))


@cache
def is_quicker() -> bool:
    """Measured once: whether a packed product takes clearly less time than torch's own."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    x, weights = torch.randn(TOKENS, 1024), torch.randn(LAYERS, 1024, 1024)
    packed = list(map(_packed, weights))
    own, theirs = (lambda: [F.linear(x, one) for one in weights]), (lambda: [_product(x, one, None) for one in packed])
    taken = [(_seconds(theirs), _seconds(own)) for _ in range(4)][1:]
    return statistics.median(quick / slow for quick, slow in taken) < ENOUGH


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _packed(weight: Tensor) -> Any:
    """``(out, in)`` as oneDNN lays it out; what torch's own compiler multiplies frozen weights by."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TOKENS)


def _product(x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _not_saved() -> PairError:
    return PairError("expected a model or fuser with weights of its own to save, got packed ones; load it again, and do not pack it")
