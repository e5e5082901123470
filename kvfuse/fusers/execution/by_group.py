"""How a fuser is run: all groups at once, or the open ones alone, a few at a time.

The groups of a fuser know nothing of each other. What one gate switches is a gate group: the keys of a layer or its
values, or both together. At inference closed gate groups are not computed at all. On a CPU the open ones are computed
one after the other if all together would not stay in the processor's cache; elsewhere adjacent ones go together.
In training, and while hooks watch a fuser, all groups are computed at once.
"""

import copy
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvfuse.cache.kv import KV, concatenate
from kvfuse.fusers.execution.feed_forward import fits_in_cache
from kvfuse.fusers.groups import from_groups, to_groups, write_groups
from kvfuse.fusers.layers import Grouped

TOKENS_PER_PIECE = 2048
"""Most tokens that training computes again at once. One piece is better than two, as the gradient of a weight that is
used twice is held until the second use; a piece this long needs about as much memory itself."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class GroupedFuser(Protocol):
    """What is needed of a fuser to run it; :class:`kvfuse.fusers.gate.GatedFuser` has all of it."""

    parts: Sequence[str]
    training: bool

    @property
    def recompute(self) -> bool:
        """Whether training keeps little for the backward pass."""

    def residual(self, *, receiver: Tensor, sharer: Tensor, gate: Tensor) -> Tensor:
        """The equation of the fuser, on groups."""

    def sharer_groups(self, sharer: KV, groups: Sequence[int] | None = None) -> Tensor:
        """What the equation reads of the sharer."""

    def switch(self, tokens: int = 1, heads: int = 1) -> Tensor:
        """The gates, ``(G, N, H)`` or what broadcasts to it."""

    def open_gate_groups(self) -> tuple[list[int], int]:
        """Numbers of the gate groups that are open, and how many there are."""


def run(fuser: Any, *, receiver: KV, sharer: KV) -> KV:
    """The residual of a fuser for all layers.

    Args:
        fuser: A module that is a :class:`GroupedFuser`.
        receiver: ``(L_r, B, H_r, T, D_r)``.
        sharer: ``(L_s, B, H_s, T, D_s)``.

    Returns:
        ``(L_r, B, H_r, T, D_r)``.
    """
    if fuser.training or torch.is_grad_enabled() or is_watched(fuser) or not is_grouped(fuser):
        return _all_groups(fuser, receiver, sharer)
    return _open_groups(fuser, receiver, sharer)


def _all_groups(fuser: GroupedFuser, receiver: KV, sharer: KV) -> KV:
    """All groups at once, in pieces of the prompt where training recomputes."""
    _, batch, heads, tokens, _ = receiver.key.shape
    # 1) Gates are drawn once for all tokens, however these are computed.
    gate = fuser.switch(batch * tokens, heads)  # (G, B * T or 1, H or 1)
    if not (fuser.recompute and fuser.training) or tokens <= TOKENS_PER_PIECE:
        return _residual(fuser, receiver, sharer, gate)
    # 2) Pieces of equal length; of each only its input is kept for the backward pass.
    size = -(-tokens // -(-tokens // TOKENS_PER_PIECE))
    gates = [gate] * -(-tokens // size)
    if gate.shape[1] > 1:
        gates = [piece.flatten(1, 2) for piece in gate.unflatten(1, (batch, tokens)).split(size, dim=2)]
    pieces = zip(receiver.split(size), sharer.split(size), gates, strict=True)
    return concatenate([checkpoint(_residual, fuser, *piece, use_reentrant=False) for piece in pieces])


def _residual(fuser: GroupedFuser, receiver: KV, sharer: KV, gate: Tensor) -> KV:
    return from_groups(_equation(fuser, receiver, sharer, gate), like=receiver, parts=fuser.parts)


def _equation(
    fuser: GroupedFuser, receiver: KV, sharer: KV, gate: Tensor, groups: Sequence[int] | None = None
) -> Tensor:
    """The fuser's equation on all groups, or on some: ``(G, N, C_r)``."""
    receiver_groups = to_groups(receiver, parts=fuser.parts, groups=groups)  # (G, N, C_r)
    sharer_groups = fuser.sharer_groups(sharer, groups)  # (G, N, C_s)
    if 1 < len(gate) < len(receiver_groups):  # a gate per layer, for its keys and its values
        gate = torch.cat([gate, gate])
    return fuser.residual(receiver=receiver_groups, sharer=sharer_groups, gate=gate)


def _open_groups(fuser: Any, receiver: KV, sharer: KV) -> KV:
    """The open gate groups, a few at a time; the residual of the others stays zero."""
    opened, num_gate_groups = fuser.open_gate_groups()
    num_groups = len(fuser.parts) * len(receiver.key)
    slices = _slices(opened, num_gate_groups, num_groups, receiver)
    if slices == [slice(0, num_gate_groups)]:
        return _residual(fuser, receiver, sharer, _open_switch(fuser))
    residual = receiver.zeros_like()
    for gate_groups in slices:
        # 1) A copy of the fuser with the weights of these gate groups.
        part = select_groups(fuser, gate_groups, num_gate_groups)
        numbers = range(num_gate_groups)[gate_groups]
        groups = [first + number for first in range(0, num_groups, num_gate_groups) for number in numbers]
        # 2) Its equation, on the caches of the same groups.
        written = _equation(part, receiver, sharer, _open_switch(part), groups)
        write_groups(residual, written, groups=groups, parts=fuser.parts)
    return residual


def _open_switch(fuser: Any) -> Tensor:
    """The gates where every group is open: exactly 0 or 1 for each head, or one for all."""
    if fuser.gate is not None and fuser.gate.logit.shape[2] > 1:
        return fuser.gate()
    return next(fuser.parameters()).new_ones(1, 1, 1)


def _slices(opened: list[int], num_gate_groups: int, num_groups: int, receiver: KV) -> list[slice]:
    """The open gate groups in the order in which to compute them, as many at a time as is best."""
    is_large = not fits_in_cache(receiver.key.device, receiver.key.nbytes + receiver.value.nbytes)
    # The weights of several gate groups of two groups each are adjacent only if they are all there are.
    is_apart = num_groups > num_gate_groups and len(opened) < num_gate_groups
    if is_large or is_apart:
        return [slice(number, number + 1) for number in opened]
    return contiguous_slices(opened)


def is_grouped(module: nn.Module) -> bool:
    """Whether all parameters and buffers of a module belong to grouped ones."""
    return all(isinstance(part, Grouped) for part in module.modules() if part._parameters or part._buffers)


def is_watched(module: nn.Module) -> bool:
    """Whether a module, or a part of it, has forward hooks, which have to see all groups at once."""
    return any(part._forward_hooks for part in module.modules())


def select_groups(module: ModuleT, gate_groups: slice, num_gate_groups: int) -> ModuleT:
    """A copy of a module with some of its gate groups; it shares the weights.

    Args:
        module: Its groups are those of the first part for every gate group, then those of the next part.
        gate_groups: Which to select.
        num_gate_groups: How many there are.
    """
    part = copy.copy(module)
    for name in ("_parameters", "_buffers"):
        tensors = getattr(module, name).items()
        setattr(part, name, {key: _select(tensor, gate_groups, num_gate_groups) for key, tensor in tensors})
    part._modules = {
        key: None if child is None else select_groups(child, gate_groups, num_gate_groups)
        for key, child in module._modules.items()
    }
    return part


def contiguous_slices(numbers: list[int]) -> list[slice]:
    """Ascending numbers as slices of adjacent ones: ``[0, 1, 4]`` is ``0:2`` and ``4:5``."""
    starts = [number for number in numbers if number - 1 not in numbers]
    stops = [number + 1 for number in numbers if number + 1 not in numbers]
    return list(map(slice, starts, stops))


def _select(tensor: Tensor | None, gate_groups: slice, num_gate_groups: int) -> Any:
    """``(k * num_gate_groups, …)`` -> ``(k * n, …)``: a view if ``k`` or ``n`` is one."""
    if tensor is None:
        return None
    return tensor.unflatten(0, (-1, num_gate_groups))[:, gate_groups].flatten(0, 1)
