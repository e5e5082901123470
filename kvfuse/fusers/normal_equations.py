"""Ridge regression from sums over tokens, one per group: memory does not grow with the number of tokens."""

import torch
from torch import Tensor

SMALLEST = 1e-12  # in place of a variance of zero


class NormalEquations:
    """Second moments of ``(x, 1)`` and ``y`` over all tokens seen, in float64.

    Attributes:
        xx: ``(G, P + 1, P + 1)``; the last row holds the sums of ``x`` and the number of tokens.
        xy: ``(G, P + 1, C)``; the last row holds the sums of ``y``.
        yy: ``(G, C)``, sums of squares.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device) -> None:
        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        self.xx = zeros(groups, inputs + 1, inputs + 1)
        self.xy = zeros(groups, inputs + 1, outputs)
        self.yy = zeros(groups, outputs)

    @property
    def count(self) -> int:
        """Tokens seen."""
        return int(self.xx[0, -1, -1])

    def add(self, x: Tensor, y: Tensor) -> None:
        """See more tokens: ``x`` ``(G, N, P)``, ``y`` ``(G, N, C)``."""
        x, y = torch.nn.functional.pad(x.double(), (0, 1), value=1.0), y.double()
        self.xx.baddbmm_(x.mT, x)
        self.xy.baddbmm_(x.mT, y)
        self.yy += y.square().sum(dim=1)

    def centred(self) -> tuple[Tensor, Tensor]:
        """Means of ``x``, ``(G, 1, P)``, and the sums of products of its deviations from them, ``(G, P, P)``."""
        mean = self.xx[:, -1:, :-1] / self.count
        return mean, self.xx[:, :-1, :-1] - self.count * mean.mT @ mean

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """``W = (S_xx + penalty * diag(S_xx))^-1 S_xy``, ``b = mean(y) - mean(x) W``, with ``S`` the centred moments.

        The penalty counts in each input's own variance, for some dimensions of a key are a hundred times as large as
        others.

        Returns:
            ``(G, P, C)`` and ``(G, 1, C)``, float64.
        """
        x, covariance = self.centred()  # (G, 1, P), (G, P, P)
        y = self.xy[:, -1:] / self.count  # (G, 1, C)
        variance = covariance.diagonal(dim1=1, dim2=2).clamp(min=SMALLEST)
        weight = torch.linalg.solve(
            covariance + penalty * torch.diag_embed(variance), self.xy[:, :-1] - self.count * x.mT @ y
        )
        return weight, y - x @ weight

    def explained(self, weight: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Share of the variance of ``y`` that a map explains, ``R^2 = 1 - |y - x W - b|^2 / |y - mean(y)|^2``.

        Returns:
            Of each head ``(G, H)`` and of all together ``(G,)``; below zero where the mean would do better.
        """
        both = torch.cat([weight, bias], dim=1)  # (G, P + 1, C)
        wrong = self.yy - 2 * (both * self.xy).sum(1) + (both * (self.xx @ both)).sum(1)  # (G, C)
        total = self.yy - self.xy[:, -1].square() / self.count
        by_head = [part.unflatten(1, (heads, -1)).sum(2) for part in (wrong, total)]
        shares = [1 - one / all_.clamp(min=SMALLEST) for one, all_ in (by_head, (wrong.sum(1), total.sum(1)))]
        return shares[0], shares[1]
