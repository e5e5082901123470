"""Building blocks that run one small network per group, all groups in one product.

A fuser has two groups a layer, one for keys and one for values, all of one shape: tensors are ``(G, N, C)`` with ``G = 2L``,
or ``G = L`` where it fuses keys or values alone.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvfuse.backends.onednn import linear
from kvfuse.cache.transformers_cache import KV
from kvfuse.fusers.execution.by_group import Grouped
from kvfuse.fusers.execution.feed_forward import feed_forward
from kvfuse.fusers.execution.versions import version_of

PARTS = ("key", "value")


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

    def place(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Write ``(G, i, o)`` and ``(G, 1, o)`` over what maps the first inputs to the first outputs."""
        self.weight[:, : weight.shape[1], : weight.shape[2]] = weight
        if bias is not None and self.bias is not None:
            self.bias[..., : bias.shape[2]] = bias

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
    """Residual feed-forward block ``x + dropout(W2(gelu(W1(norm(x)))))`` per group, without biases (paper's code, fact 1.2).

    Attributes:
        recompute: Whether training keeps the input alone, and computes what is inside again.
    """

    recompute = False

    def __init__(self, groups: int, features: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = GroupedRMSNorm(groups, features)
        self.w1 = GroupedLinear(groups, features, hidden, bias=False)
        self.w2 = GroupedLinear(groups, hidden, features, bias=False)
        self.dropout = nn.Dropout(dropout)
        self._kept: tuple[Any, Tensor] | None = None

    def reset_parameters(self) -> None:
        for part in (self.norm, self.w1, self.w2):
            part.reset_parameters()

    def zero_output_(self) -> None:
        """Begin as the identity, from where it still learns."""
        nn.init.zeros_(self.w2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(G, N, C)`` to ``(G, N, C)``."""
        if torch.is_grad_enabled() and self._is_full and not torch.is_autocast_enabled(x.device.type):
            dropout = self.dropout.p if self.training else 0.0
            return feed_forward(
                x, self.norm.weight, self.w1.weight, self.w2.weight, dropout, self.norm.eps, not self.recompute
            )
        return x + self.dropout(self.w2(self._inner(x)))

    def into(self, out: GroupedLinear, x: Tensor) -> Tensor:
        """``out(self(x))``; at inference, and for more tokens than ``out`` has outputs, ``w2`` and ``out`` are multiplied first."""
        if self.training or not isinstance(self.w2, GroupedLinear) or x.shape[1] <= out.weight.shape[2]:
            return out(self(x))
        return torch.baddbmm(out(x), self._inner(x), self._product(out))

    def _product(self, out: GroupedLinear) -> Tensor:
        """``w2 @ out``, ``(G, I, O)``; on other devices than the CPU it is not computed again until one of the two changes."""
        if torch.is_grad_enabled() or self.w2.weight.device.type == "cpu":
            return self.w2.weight @ out.weight
        version = version_of(self.w2.weight), version_of(out.weight)
        if self._kept is None or self._kept[0] != version:
            self._kept = version, self.w2.weight @ out.weight
        return self._kept[1]

    @property
    def _is_full(self) -> bool:
        """Whether all weights are there as they were trained, neither quantised nor folded."""
        return (
            isinstance(self.norm, GroupedRMSNorm)
            and isinstance(self.w1, GroupedLinear)
            and isinstance(self.w2, GroupedLinear)
        )

    def _inner(self, x: Tensor) -> Tensor:
        return F.gelu(self.w1(self.norm(x)))


class HeadWeights(nn.Module):
    """The weight of every head at every token, a module of its own so that it can be watched."""

    def forward(self, logits: Tensor) -> Tensor:
        """Map ``(G, N, H)`` to ``(G, N, H)`` in (0, 1)."""
        return torch.sigmoid(logits)


def to_groups(
    kv: KV, layers: list[int] | None = None, parts: Sequence[str] = PARTS, groups: Sequence[int] | None = None
) -> Tensor:
    """Every token's heads side by side, for the chosen layers of the first part, then of the second.

    Args:
        kv: ``(L, B, H, T, D)``.
        layers: By default all.
        parts: Which of its parts.
        groups: By default all of those; else some of them, ascending.

    Returns:
        ``(G, B * T, H * D)``.
    """
    layers = list(range(len(kv.key))) if layers is None else layers
    chosen = [
        _select(getattr(kv, part), some).transpose(2, 3)
        for part, some in _by_part([layers] * len(parts), parts, groups)
    ]
    return (chosen[0] if len(chosen) == 1 else torch.cat(chosen)).flatten(3).flatten(1, 2)


def from_groups(projected: Tensor, weight: Tensor | None, like: KV, parts: Sequence[str] = PARTS) -> KV:
    """Weight every head and undo :func:`to_groups`.

    Args:
        projected: ``(G, B * T, H * D)``.
        weight: ``(G, B * T, H)``, or what broadcasts to it; None: one.
        like: Tells ``B``, ``H``, ``T`` and ``D``.
        parts: What the groups are; the other part's residual is exactly zero.

    Returns:
        ``(L, B, H, T, D)``.
    """
    by_part = dict(zip(parts, _weighted(projected, weight, like).chunk(len(parts)), strict=True))
    return KV(*(by_part[part] if part in by_part else torch.zeros_like(getattr(like, part)) for part in PARTS))


def write_groups(
    out: KV, projected: Tensor, weight: Tensor | None, parts: Sequence[str], groups: Sequence[int]
) -> None:
    """Write some groups, ascending, over those of ``out``; else as :func:`from_groups`."""
    weighted, start = _weighted(projected, weight, out), 0
    for part, layers in _by_part([list(range(len(out.key)))] * len(parts), parts, groups):
        getattr(out, part)[layers[0] : layers[-1] + 1] = weighted[start : start + len(layers)]
        start += len(layers)


def _weighted(projected: Tensor, weight: Tensor | None, like: KV) -> Tensor:
    """``(G, B * T, H * D)`` -> ``(G, B, H, T, D)``."""
    _, batch, heads, tokens, dim = like.key.shape
    by_head = projected.unflatten(-1, (heads, dim))  # (G, N, H, D)
    by_head = by_head if weight is None else by_head * weight.unsqueeze(-1)
    return by_head.unflatten(1, (batch, tokens)).transpose(2, 3)


def _by_part(
    layers: list[list[int]], parts: Sequence[str], groups: Sequence[int] | None
) -> list[tuple[str, list[int]]]:
    """Each part with its layers, where ``layers`` has those of all groups of a part; parts of which no group is wanted are left out."""
    pairs = [(place, layer) for place, some in enumerate(layers) for layer in some]
    pairs = pairs if groups is None else [pairs[group] for group in groups]
    by_part = [(part, [layer for other, layer in pairs if other == place]) for place, part in enumerate(parts)]
    return [(part, some) for part, some in by_part if some]


def _select(part: Tensor, layers: list[int]) -> Tensor:
    """Some layers of ``(L, B, H, T, D)``: neighbours without a copy."""
    first, last = layers[0], layers[-1]
    return (
        part[first : last + 1] if layers == list(range(first, last + 1)) else part[_index(tuple(layers), part.device)]
    )


@cache
def _index(layers: tuple[int, ...], device: torch.device) -> Tensor:
    """Sent to a device once, for a GPU waits for what it is sent."""
    return torch.tensor(layers, device=device)
