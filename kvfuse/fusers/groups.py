"""From keys and values to groups and back: the layout in which fusers compute.

A group is all that has weights of its own: the keys of one layer, or its values. Tensors of groups are ``(G, N, C)``:

- ``G`` groups, the keys of all layers, then the values (``2 L``, or ``L`` where only one of the two is fused),
- ``N`` tokens,
- ``C = H * D`` channels: all heads of a token side by side.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from kvfuse.cache.kv import KV

PARTS = ("key", "value")


def to_groups(
    kv: KV, *, layers: Sequence[int] | None = None, parts: Sequence[str] = PARTS, groups: Sequence[int] | None = None
) -> Tensor:
    """Lay a cache out in groups.

    Args:
        kv: ``(L, B, H, T, D)``.
        layers: One layer of ``kv`` per group of each part; by default each of them.
        parts: ``key``, ``value`` or both.
        groups: Numbers of the groups to return, ascending; by default all.

    Returns:
        ``(G, B * T, H * D)``.
    """
    layers = range(len(kv.key)) if layers is None else layers
    chosen = [
        _select_layers(getattr(kv, part), [layers[index] for index in indices]).transpose(2, 3)  # (L', B, T, H, D)
        for part, indices in _by_part(len(layers), parts, groups)
    ]
    return (chosen[0] if len(chosen) == 1 else torch.cat(chosen)).flatten(3).flatten(1, 2)


def from_groups(residual: Tensor, *, like: KV, parts: Sequence[str] = PARTS) -> KV:
    """Undo :func:`to_groups`.

    Args:
        residual: ``(G, B * T, H * D)``.
        like: Gives ``B``, ``H``, ``T`` and ``D``.
        parts: What the groups are; the residual of the other part is exactly zero.

    Returns:
        ``(L, B, H, T, D)``.
    """
    by_part = dict(zip(parts, _unflatten(residual, like).chunk(len(parts)), strict=True))
    return KV(*(by_part[part] if part in by_part else torch.zeros_like(getattr(like, part)) for part in PARTS))


def write_groups(out: KV, residual: Tensor, *, groups: Sequence[int], parts: Sequence[str] = PARTS) -> None:
    """Write the residual of some groups, ascending and of adjacent layers, into those of ``out``."""
    residual, start = _unflatten(residual, out), 0
    for part, layers in _by_part(len(out.key), parts, groups):
        getattr(out, part)[layers[0] : layers[-1] + 1] = residual[start : start + len(layers)]
        start += len(layers)


def scale_heads(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply the channels of every head by its weight.

    Args:
        x: ``(G, N, H * D)``.
        weight: ``(G, N, H)``, or what broadcasts to it.

    Returns:
        ``(G, N, H * D)``.
    """
    if weight.shape[-1] == 1:  # one weight for all heads
        return x * weight
    return (x.unflatten(-1, (weight.shape[-1], -1)) * weight.unsqueeze(-1)).flatten(2)


def _by_part(num_layers: int, parts: Sequence[str], groups: Sequence[int] | None) -> Iterator[tuple[str, list[int]]]:
    """The parts that some of the groups belong to, each with the layers of these groups."""
    groups = range(num_layers * len(parts)) if groups is None else groups
    for number, part in enumerate(parts):
        layers = [group % num_layers for group in groups if group // num_layers == number]
        if layers:
            yield part, layers


def _unflatten(residual: Tensor, like: KV) -> Tensor:
    """``(G, B * T, H * D)`` -> ``(G, B, H, T, D)``."""
    _, batch, heads, tokens, dim = like.key.shape
    return residual.unflatten(-1, (heads, dim)).unflatten(1, (batch, tokens)).transpose(2, 3)


def _select_layers(part: Tensor, layers: list[int]) -> Tensor:
    """Layers of ``(L, B, H, T, D)``; adjacent ones without a copy."""
    first, last = layers[0], layers[-1]
    if layers == list(range(first, last + 1)):
        return part[first : last + 1]
    return part[_index(tuple(layers), part.device)]


@cache
def _index(layers: tuple[int, ...], device: torch.device) -> Tensor:
    """An index tensor, sent to its device once: a GPU waits for what it is sent."""
    return torch.tensor(layers, device=device)
