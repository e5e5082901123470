"""Maps from one model's tokens to the other's, ``(N, P)`` to ``(N, C)``, and how much of a space such tokens fill."""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from kvfuse.fusers.normal_equations import NormalEquations

Map = Callable[[Tensor], Tensor]
NEIGHBOURS = 5
RIDGE_PENALTY = 0.01
BATCH = 512


def mean(y: Tensor) -> Map:
    """The mean of ``y`` ``(N, C)``, whatever is given."""
    middle = y.mean(0)
    return lambda x: middle.expand(len(x), -1)


def ridge(x: Tensor, y: Tensor) -> Map:
    """Ridge regression of ``y`` ``(N, C)`` on ``x`` ``(N, P)``."""
    moments = NormalEquations(1, x.shape[1], y.shape[1], x.device)
    moments.add(x[None], y[None])
    weight, bias = (part[0].float() for part in moments.solve(RIDGE_PENALTY))
    return lambda x: x @ weight + bias


def perceptrons(source: Tensor, target: Tensor, hidden: int, stages: Sequence[int], seed: int) -> list[Map]:
    """Three linear layers with GELU between them, trained by Adam, as they are after so many steps; inputs and outputs standardized.

    Args:
        source: ``(N, P)``.
        target: ``(N, C)``.
        hidden: Width of the two layers within.
        stages: After how many steps to keep it, growing.
        seed: Of weights and batches.
    """
    x, y = (Standard(part) for part in (source, target))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [source.shape[1], hidden, hidden, target.shape[1]]
        linear = [nn.Linear(one, other) for one, other in pairwise(sizes)]
    net = nn.Sequential(linear[0], nn.GELU(), linear[1], nn.GELU(), linear[2]).to(source.device)
    adam = torch.optim.Adam(net.parameters(), lr=2e-3)
    kept: list[Map] = []
    inputs, outputs = x.to(source), y.to(target)
    for step in range(stages[-1] + 1):
        if step in stages:
            kept.append(_frozen(copy.deepcopy(net).requires_grad_(False), x, y))
        rows = torch.randint(len(inputs), (BATCH,), generator=generator).to(inputs.device)
        loss = nn.functional.mse_loss(net(inputs[rows]), outputs[rows])
        adam.zero_grad()
        loss.backward()
        adam.step()
    return kept


class Standard:
    """Takes off mean and scale of each dimension of ``(N, C)``, and puts them on again."""

    def __init__(self, sample: Tensor) -> None:
        self.mean, self.scale = sample.mean(0), sample.std(0).clamp(min=1e-6)

    def to(self, given: Tensor) -> Tensor:
        return (given - self.mean) / self.scale

    def back(self, given: Tensor) -> Tensor:
        return given * self.scale + self.mean


def coverage(target: np.ndarray, points: np.ndarray, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """How the points fill the target's space.

    Args:
        target: ``(N, C)``.
        points: ``(M, C)``.
        neighbours: A ball around each target point reaches to this nearest other one.

    Returns:
        ``inside``: the share of points in any ball; ``reached``: the share of balls with a point in them.
    """
    from sklearn.neighbors import NearestNeighbors

    count = min(neighbours, len(target) - 1)
    radii = NearestNeighbors(n_neighbors=count).fit(target).kneighbors()[0][:, -1]  # without themselves
    within = np.linalg.norm(points[:, None] - target[None], axis=-1) <= radii
    return {"inside": float(within.any(1).mean()), "reached": float(within.any(0).mean())}


def _frozen(net: nn.Module, x: Standard, y: Standard) -> Map:
    return lambda given: y.back(net(x.to(given)))
