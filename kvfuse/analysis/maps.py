"""Maps from the sharer's tokens to the receiver's, ``(N, P)`` to ``(N, C)``, and how much of a space tokens fill."""

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
TOKENS_PER_STEP = 512


def mean(target: Tensor) -> Map:
    """Returns the constant map to the mean of ``target`` ``(N, C)``."""
    centre = target.mean(0)
    return lambda x: centre.expand(len(x), -1)


def ridge(*, source: Tensor, target: Tensor) -> Map:
    """Returns the ridge regression of ``target`` ``(N, C)`` on ``source`` ``(N, P)``."""
    equations = NormalEquations(1, source.shape[1], target.shape[1], source.device)
    equations.add(source[None], target[None])
    weight, bias = (part[0].float() for part in equations.solve(RIDGE_PENALTY))
    return lambda x: x @ weight + bias


def perceptrons(*, source: Tensor, target: Tensor, hidden: int, stages: Sequence[int], seed: int) -> list[Map]:
    """Train three linear layers with GELU between them by Adam; inputs and outputs are standardized.

    Args:
        source: ``(N, P)``.
        target: ``(N, C)``.
        hidden: Width of both hidden layers.
        stages: Numbers of steps, growing.
        seed: Of weights and batches.

    Returns:
        The network after each of the ``stages``.
    """
    # 1) Standardize; initialize without a trace in the caller's random numbers.
    x, y = Standardizer(source), Standardizer(target)
    inputs, outputs = x(source), y(target)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = [nn.Linear(*widths) for widths in pairwise([source.shape[1], hidden, hidden, target.shape[1]])]
    net = nn.Sequential(linear[0], nn.GELU(), linear[1], nn.GELU(), linear[2]).to(source.device)
    adam = torch.optim.Adam(net.parameters(), lr=2e-3)
    # 2) Train on random tokens; keep a copy at each stage.
    maps: list[Map] = []
    for step in range(stages[-1] + 1):
        if step in stages:
            maps.append(_frozen(copy.deepcopy(net).requires_grad_(False), x, y))
        rows = torch.randint(len(inputs), (TOKENS_PER_STEP,), generator=generator).to(inputs.device)
        loss = nn.functional.mse_loss(net(inputs[rows]), outputs[rows])
        adam.zero_grad()
        loss.backward()
        adam.step()
    return maps


class Standardizer:
    """Removes the mean and scale of each dimension of ``(N, C)``.

    Args:
        sample: ``(N, C)``, to measure them on.
    """

    def __init__(self, sample: Tensor) -> None:
        self.mean, self.scale = sample.mean(0), sample.std(0).clamp(min=1e-6)

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale

    def invert(self, x: Tensor) -> Tensor:
        """Apply mean and scale again."""
        return x * self.scale + self.mean


def coverage(*, target: np.ndarray, points: np.ndarray, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """Measure how the points fill the target's space.

    Args:
        target: ``(N, C)``. Around each of its points there is a ball.
        points: ``(M, C)``.
        neighbours: The ball reaches to this nearest other target point.

    Returns:
        ``inside``: the share of points in any ball; ``reached``: the share of balls with a point in them.
    """
    from sklearn.neighbors import NearestNeighbors

    count = min(neighbours, len(target) - 1)
    radii = NearestNeighbors(n_neighbors=count).fit(target).kneighbors()[0][:, -1]  # of others than themselves
    within = np.linalg.norm(points[:, None] - target[None], axis=-1) <= radii  # (M, N)
    return {"inside": float(within.any(1).mean()), "reached": float(within.any(0).mean())}


def _frozen(net: nn.Module, x: Standardizer, y: Standardizer) -> Map:
    return lambda given: y.invert(net(x(given)))
