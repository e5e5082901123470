"""Multiply the weights of norms into the linear layers behind them, for fusers that are only used: fewer kernels."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvfuse.errors import PairError
from kvfuse.fusers.layers import Grouped, GroupedFFN, GroupedLinear, GroupedRMSNorm


class FoldedRMSNorm(Grouped):
    """A ``GroupedRMSNorm`` whose weight is part of the next linear layer."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of ``(G, N, C)``."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise PairError(
            "expected a fuser to save with its own norms, got a folded one; load it again, and do not fold it"
        )


@torch.no_grad()
def fold_norms(fuser: nn.Module) -> None:
    """Change a frozen fuser in place; quantised layers stay as they are."""
    for block in fuser.modules():
        if not isinstance(block, GroupedFFN):
            continue
        if isinstance(block.norm, GroupedRMSNorm) and isinstance(block.w1, GroupedLinear):
            block.w1.weight.mul_(block.norm.weight.mT)  # (G, C, I) * (G, C, 1)
            block.set_submodule("norm", FoldedRMSNorm(block.norm.eps))
