"""The learned switch of a layer: open or closed at inference, a noisy slope while training."""

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """One gate per group (paper, 3.3.2): binary at inference, Gumbel-sigmoid with falling temperature while training.

    The noise is logistic, the difference of two Gumbel draws, so that a logit of zero is open half of the time, and one
    draw switches a whole layer, as at inference.

    Attributes:
        logit: ``(G, 1, 1)``; the gate is open where it is above zero. (Never 0-d: FSDP cannot shard that.)
    """

    def __init__(self, groups: int, initial_temperature: float, final_temperature: float) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.empty(groups, 1, 1))
        self.initial_temperature, self.final_temperature = initial_temperature, final_temperature
        self.temperature = initial_temperature

    def reset_parameters(self, logit: float) -> None:
        nn.init.constant_(self.logit, logit)

    def anneal(self, share: float) -> None:
        """Set the temperature for a run of which ``share`` is done: exponential, as the reference anneals."""
        ratio = self.final_temperature / self.initial_temperature
        self.temperature = self.initial_temperature * ratio ** min(share, 1.0)

    def forward(self) -> Tensor:
        """``(G, 1, 1)``: exactly 0 or 1 at inference, in (0, 1) while training."""
        if not self.training:
            return (self.logit > 0).to(self.logit.dtype)
        uniform = torch.rand_like(self.logit, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
        return torch.sigmoid((self.logit + torch.logit(uniform)) / self.temperature).to(self.logit.dtype)
