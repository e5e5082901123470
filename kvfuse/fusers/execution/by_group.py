"""A fuser in lanes: networks of one shape that know nothing of each other, each with weights of its own.

What one gate switches is a lane: the keys of a layer, or its values, or both together. At inference lanes may be computed one
after another, so that what is between two products stays in a processor's cache, and those behind closed gates not at all.
"""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
CACHED_BYTES = 2**21  # that stay in a CPU's cache, of one tensor of all groups; several of them are alive at a time


class Grouped(nn.Module):
    """Base of modules whose parameters and buffers have the groups for their first axis, and whose groups do not mix."""


def fits(device: torch.device, nbytes: int) -> bool:
    """Whether one tensor of so many bytes is best computed as a whole, not group by group: on a CPU, where it stays in the cache."""
    return device.type != "cpu" or nbytes <= CACHED_BYTES


def has_lanes(module: nn.Module) -> bool:
    """Whether all that a module computes with is grouped."""
    return all(isinstance(part, Grouped) for part in module.modules() if part._parameters or part._buffers)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody looks at what a module, or a part of it, computes, and so has to see all lanes at once."""
    return any(part._forward_hooks for part in module.modules())


def cut(module: M, lanes: slice, of: int) -> M:
    """The same module for some of its lanes alone; it is made anew and shares the weights.

    Args:
        module: What has ``k`` groups for each of its lanes: those of the first part, then of the next.
        lanes: Which of them.
        of: How many there are.
    """
    part = copy.copy(module)
    part._parameters = {name: _cut(tensor, lanes, of) for name, tensor in module._parameters.items()}
    part._buffers = {name: _cut(tensor, lanes, of) for name, tensor in module._buffers.items()}
    part._modules = {name: None if child is None else cut(child, lanes, of) for name, child in module._modules.items()}
    return part


def runs(chosen: list[int]) -> list[slice]:
    """Ascending numbers as slices of neighbours: ``[0, 1, 4]`` is ``0:2`` and ``4:5``."""
    starts = [one for one in chosen if one - 1 not in chosen]
    stops = [one + 1 for one in chosen if one + 1 not in chosen]
    return list(map(slice, starts, stops))


def _cut(tensor: Tensor | None, lanes: slice, of: int) -> Any:
    """``(k * of, …)`` -> ``(k * n, …)``; a view for one group a lane, or for one lane."""
    return None if tensor is None else tensor.unflatten(0, (-1, of))[:, lanes].flatten(0, 1)
