"""Constants multiplied into weights beforehand, for fusers that are only used."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvfuse.errors import PairError
from kvfuse.fusers.execution.by_group import Grouped
from kvfuse.fusers.layers import GroupedFFN, GroupedLinear, GroupedRMSNorm


class FoldedRMSNorm(Grouped):
    """``GroupedRMSNorm`` whose weight the next product has."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of ``(G, N, C)``."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise PairError(
            "expected a fuser with weights of its own to save, got a folded one; load it again, and do not fold it"
        )


@torch.no_grad()
def fold(fuser: nn.Module) -> None:
    """Change a frozen fuser in place; quantised products stay as they are."""
    for block in fuser.modules():
        if (
            isinstance(block, GroupedFFN)
            and isinstance(block.norm, GroupedRMSNorm)
            and isinstance(block.w1, GroupedLinear)
        ):
            block.w1.weight.mul_(block.norm.weight.mT)  # (G, C, I) * (G, C, 1)
            block.set_submodule("norm", FoldedRMSNorm(block.norm.eps))
