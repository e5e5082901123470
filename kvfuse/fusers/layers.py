"""Building blocks of fusers: one small network per group, all groups in one product.

Tensors are ``(G, N, C)``, see :mod:`kvfuse.fusers.groups`.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kvfuse.backends.onednn import linear
from kvfuse.fusers.execution.feed_forward import feed_forward

MIN_STD = 1e-4
"""Of a channel that is scaled; below it a channel counts as constant."""


class Grouped(nn.Module):
    """Base of modules whose parameters and buffers have the groups as their first axis, and whose groups do not mix."""


class GroupedLinear(Grouped):
    """One linear layer per group.

    Attributes:
        weight: ``(G, in, out)``.
        bias: ``(G, 1, out)`` or None.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(groups, 1, outputs)) if bias else None

    def reset_parameters(self, zero: bool = False) -> None:
        """Draw as ``nn.Linear`` does, or set to zero."""
        bound = 0.0 if zero else 1 / math.sqrt(self.weight.shape[1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(G, N, in)`` to ``(G, N, out)``."""
        if len(x) == 1:
            return linear(x[0], self.weight[0].T, None if self.bias is None else self.bias[0, 0])[None]
        return torch.bmm(x, self.weight) if self.bias is None else torch.baddbmm(self.bias, x, self.weight)


class GroupedRMSNorm(Grouped):
    """RMSNorm with one weight ``(G, 1, C)`` per group."""

    def __init__(self, groups: int, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, 1, features))
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of ``(G, N, C)``."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class GroupedLayerNorm(Grouped):
    """LayerNorm with one weight and bias ``(G, 1, C)`` per group."""

    def __init__(self, groups: int, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, 1, features))
        self.bias = nn.Parameter(torch.empty(groups, 1, features))
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of ``(G, N, C)``."""
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=self.eps), self.weight)


class GroupedStandardize(Grouped):
    """Centres and scales the channels of each group by measured statistics, which are not trained.

    Some models' keys have channels of large means (Qwen's have biases), beside which nothing else would be learnt.

    Attributes:
        mean: ``(G, 1, C)``.
        scale: ``(G, 1, C)``, one over the standard deviation.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, groups: int, features: int) -> None:
        super().__init__()
        for name in ("mean", "scale"):
            self.register_buffer(name, torch.empty(groups, 1, features))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.scale)

    @torch.no_grad()
    def measure(self, tokens: Iterable[Tensor]) -> None:
        """Take the statistics of batches ``(G, N, C)`` of tokens, at least two tokens in all."""
        # 1) Sums in float64: a variance is a small difference of large squares
        count, total = 0, torch.zeros_like(self.mean, dtype=torch.float64)
        squares = torch.zeros_like(total)
        for batch in tokens:
            values = batch.double()
            count += values.shape[1]
            total += values.sum(1, keepdim=True)
            squares += values.square().sum(1, keepdim=True)
        # 2) A channel that never changes is centred, not scaled
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(std > MIN_STD, 1 / std, torch.ones_like(std)))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(G, N, C)`` to ``(G, N, C)``."""
        return (x - self.mean) * self.scale


class GroupedSwiGLU(nn.Module):
    """``silu(gate(x)) * up(x)`` per group, with biases."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.gate = GroupedLinear(groups, inputs, outputs)
        self.up = GroupedLinear(groups, inputs, outputs)

    def reset_parameters(self) -> None:
        self.gate.reset_parameters()
        self.up.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(G, N, in)`` to ``(G, N, out)``."""
        return F.silu(self.gate(x)) * self.up(x)


class GroupedFFN(nn.Module):
    """Residual feed-forward block ``x + dropout(w2(gelu(w1(norm(x)))))`` per group, without biases (paper's code).

    Attributes:
        recompute: Whether training keeps only the input and computes the inside again for the backward pass.
    """

    recompute = False

    def __init__(self, groups: int, features: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = GroupedRMSNorm(groups, features)
        self.w1 = GroupedLinear(groups, features, hidden, bias=False)
        self.w2 = GroupedLinear(groups, hidden, features, bias=False)
        self.dropout = nn.Dropout(dropout)
        self._composed: tuple[Any, Tensor] | None = None

    def reset_parameters(self) -> None:
        for part in (self.norm, self.w1, self.w2):
            part.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(G, N, C)`` to ``(G, N, C)``."""
        if torch.is_grad_enabled() and self._is_plain and not torch.is_autocast_enabled(x.device.type):
            dropout = self.dropout.p if self.training else 0.0
            weights = self.norm.weight, self.w1.weight, self.w2.weight
            return feed_forward(x, *weights, dropout=dropout, eps=self.norm.eps, keep=not self.recompute)
        return x + self.dropout(self.w2(self._inner(x)))

    def compose(self, out: GroupedLinear, x: Tensor) -> Tensor:
        """``out(self(x))``, with ``w2`` and ``out`` multiplied first where that is less arithmetic; for inference."""
        tokens, features, outputs = x.shape[1], x.shape[2], out.weight.shape[2]
        if not isinstance(self.w2, GroupedLinear) or outputs * (tokens + features) >= tokens * features:
            return out(self(x))
        return torch.baddbmm(out(x), self._inner(x), self._product(out))

    def _product(self, out: GroupedLinear) -> Tensor:
        """``w2 @ out``, ``(G, hidden, outputs)``; kept on a GPU until one of the two changes."""
        if torch.is_grad_enabled() or self.w2.weight.device.type == "cpu":
            return self.w2.weight @ out.weight
        version = version_of(self.w2.weight), version_of(out.weight)
        if self._composed is None or self._composed[0] != version:
            self._composed = version, self.w2.weight @ out.weight
        return self._composed[1]

    @property
    def _is_plain(self) -> bool:
        """Whether all weights are as they were trained: neither quantised nor folded."""
        return isinstance(self.norm, GroupedRMSNorm) and all(
            isinstance(linear, GroupedLinear) for linear in (self.w1, self.w2)
        )

    def _inner(self, x: Tensor) -> Tensor:
        return F.gelu(self.w1(self.norm(x)))


class HeadWeights(nn.Module):
    """The weight of every head at every token; a module, so that hooks can watch it."""

    def forward(self, logits: Tensor) -> Tensor:
        """Map ``(G, N, H)`` to ``(G, N, H)`` in (0, 1)."""
        return torch.sigmoid(logits)


def chain(x: Tensor, *modules: nn.Module | None) -> Tensor:
    """Apply modules one after the other; None is skipped.

    The networks of a fuser are written as chains, because a chain is what can be run in less memory or time than its
    modules one by one: where training recomputes, only ``x`` is kept; at inference a block and a narrow linear layer
    behind it become one product less.
    """
    steps = [module for module in modules if module is not None]
    if torch.is_grad_enabled() and any(step.training and getattr(step, "recompute", False) for step in steps):
        return checkpoint(_apply, x, steps, use_reentrant=False)
    return _apply(x, steps)


def _apply(x: Tensor, modules: list[nn.Module]) -> Tensor:
    steps: list[Any] = modules[:-1]
    last: Any = modules[-1]
    block = steps[-1] if steps else None
    if isinstance(block, GroupedFFN) and isinstance(last, GroupedLinear) and not last.training:
        steps, last = steps[:-1], partial(block.compose, last)
    for step in steps:
        x = step(x)
    return last(x)


def version_of(parameter: Tensor) -> tuple[Any, ...]:
    """A value that changes when a parameter is changed in place, cast, moved or sliced.

    Writing to ``parameter.data`` leaves no trace.
    """
    version = 0 if parameter.is_inference() else parameter._version
    return version, parameter.data_ptr(), parameter.shape, parameter.dtype, parameter.device
