"""The learned switch of a layer, or of one of its heads: open or closed at inference, a noisy slope while training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvfuse.fusers.execution.by_group import Grouped
from kvfuse.fusers.execution.versions import version_of

GATE_NOISES = ("logistic", "logistic-per-token", "gumbel")


class Gate(Grouped):
    """One gate per group (paper, 3.3.2): binary at inference, Gumbel-sigmoid with falling temperature while training.

    ``logistic`` noise is the difference of two Gumbel draws, so that a logit of zero is open half of the time, and one draw
    switches all that the gate switches at inference; ``logistic-per-token`` draws for every head and token, which learns
    faster (``docs/gates.md``). ``gumbel`` is the reference's: one Gumbel draw per head and token, which opens 63% at a logit
    of zero, where a gate is closed at inference.

    Attributes:
        logit: ``(G, 1, 1)``, or ``(G, 1, H)`` with a gate per head; open where it is above zero. (Never 0-d: FSDP cannot
            shard that.)
    """

    def __init__(
        self, groups: int, initial_temperature: float, final_temperature: float, heads: int = 1, noise: str = "logistic"
    ) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.empty(groups, 1, heads))
        self.initial_temperature, self.final_temperature = initial_temperature, final_temperature
        self.temperature = initial_temperature
        self.noise = noise
        self._opened: tuple[tuple[Any, ...], list[int]] | None = None

    def reset_parameters(self, logit: float) -> None:
        nn.init.constant_(self.logit, logit)

    def anneal(self, share: float) -> None:
        """Set the temperature for a run of which ``share`` is done: exponential, as the reference anneals."""
        ratio = self.final_temperature / self.initial_temperature
        self.temperature = self.initial_temperature * ratio ** min(share, 1.0)

    def opened(self) -> list[int]:
        """The groups of which at least one head is open; another device than the CPU is not asked again until a logit changes."""
        version = version_of(self.logit)
        if self.logit.device.type == "cpu" or self._opened is None or self._opened[0] != version:
            self._opened = version, (self.logit > 0).flatten(1).any(1).nonzero().flatten().tolist()
        return self._opened[1]

    def by_part(self, parts: Sequence[str]) -> dict[str, Tensor]:
        """Which gates are open, ``(L,)`` or ``(L, H)`` bool, where the groups are all layers of the first part, then of the next."""
        opened = (self.logit > 0).flatten(1).squeeze(1).cpu()
        return {f"{part}s": half for part, half in zip(parts, opened.chunk(len(parts)), strict=True)}

    def forward(self, tokens: int = 1, heads: int = 1) -> Tensor:
        """The switch, for so many tokens and heads.

        Returns:
            As :attr:`logit`, exactly 0 or 1 at inference; in (0, 1) while training, there ``(G, tokens, heads)`` where the
            noise is drawn for every token.
        """
        if not self.training:
            return (self.logit > 0).to(self.logit.dtype)
        shape = self.logit.shape if self.noise == "logistic" else (len(self.logit), tokens, heads)
        uniform = torch.rand(shape, device=self.logit.device).clamp(1e-6, 1 - 1e-6)
        noise = -torch.log(-torch.log(uniform)) if self.noise == "gumbel" else torch.logit(uniform)
        return torch.sigmoid((self.logit + noise) / self.temperature).to(self.logit.dtype)
