"""The learned switch of a layer, or of a head, and what fusers behind such gates have in common."""

import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from kvfuse.cache.kv import KV
from kvfuse.fusers.base import Fuser, FuserConfig, require_choices
from kvfuse.fusers.execution.by_group import run
from kvfuse.fusers.groups import PARTS, scale_heads, to_groups
from kvfuse.fusers.layers import Grouped, GroupedFFN, version_of

GATE_NOISES = ("logistic", "logistic-per-token", "gumbel")


class Gate(Grouped):
    """One gate per group (paper, 3.3.2): binary at inference, a Gumbel-sigmoid of falling temperature while training.

    ``logistic`` noise is the difference of two Gumbel draws, so a logit of zero is open half of the time; one draw
    switches everything that the gate switches at inference. ``logistic-per-token`` draws for every head and token,
    which learns faster (``docs/gates.md``). ``gumbel`` is the reference's: one Gumbel draw per head and token, which
    opens 63% at a logit of zero, where a gate is closed at inference.

    Attributes:
        logit: ``(G, 1, 1)``, or ``(G, 1, H)`` with a gate per head; open where it is above zero. (Never 0-d: FSDP
            cannot shard that.)
    """

    def __init__(
        self, groups: int, initial_temperature: float, final_temperature: float, heads: int = 1, noise: str = "logistic"
    ) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.empty(groups, 1, heads))
        self.initial_temperature, self.final_temperature = initial_temperature, final_temperature
        self.temperature = initial_temperature
        self.noise = noise
        self._opened: tuple[Any, list[int]] | None = None

    def reset_parameters(self, logit: float) -> None:
        nn.init.constant_(self.logit, logit)

    def anneal(self, share: float) -> None:
        """Set the temperature for a run of which ``share`` is done: exponential, as the reference anneals."""
        ratio = self.final_temperature / self.initial_temperature
        self.temperature = self.initial_temperature * ratio ** min(share, 1.0)

    def opened(self) -> list[int]:
        """The groups with an open head. A GPU is asked only once a logit has changed, since asking waits for it."""
        version = None if self.logit.device.type == "cpu" else version_of(self.logit)
        if version is None or self._opened is None or self._opened[0] != version:
            self._opened = version, (self.logit > 0).flatten(1).any(1).nonzero().flatten().tolist()
        return self._opened[1]

    def by_part(self, parts: Sequence[str]) -> dict[str, Tensor]:
        """The open gates of each part, ``(L,)`` or ``(L, H)`` bool."""
        opened = (self.logit > 0).flatten(1).squeeze(1).cpu()
        return {f"{part}s": half for part, half in zip(parts, opened.chunk(len(parts)), strict=True)}

    def forward(self, tokens: int = 1, heads: int = 1) -> Tensor:
        """The switch for a number of tokens and heads.

        Returns:
            The shape of :attr:`logit`, exactly 0 or 1, at inference. In (0, 1) while training, there ``(G, tokens,
            heads)`` if noise is drawn for every token.
        """
        if not self.training:
            return (self.logit > 0).to(self.logit.dtype)
        shape = self.logit.shape if self.noise == "logistic" else (len(self.logit), tokens, heads)
        uniform = torch.rand(shape, device=self.logit.device).clamp(1e-6, 1 - 1e-6)
        noise = -torch.log(-torch.log(uniform)) if self.noise == "gumbel" else torch.logit(uniform)
        return torch.sigmoid((self.logit + noise) / self.temperature).to(self.logit.dtype)


class GatedConfig(FuserConfig):
    """Options of the kinds that are trained behind a gate.

    Attributes:
        dropout: Within the fuser's networks.
        gate_init: Initial gate logit.
        gate_noise: ``logistic`` | ``logistic-per-token`` | ``gumbel`` (:class:`Gate`).
        initial_temperature: Of the gates, at the start of training.
        final_temperature: At its end.
        zero_init: Start from a projection of zero, that is from a residual of zero unless the cache is replaced.
    """

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    gate_init: float = 0.0
    gate_noise: str = "logistic"
    initial_temperature: Annotated[float, Field(gt=0)] = 1.0
    final_temperature: Annotated[float, Field(gt=0)] = 0.001
    zero_init: bool = False

    def new_gate(self, groups: int, heads: int = 1) -> Gate:
        """A gate for each group, or for each head of a group. Raises PairError if the noise is unknown."""
        require_choices(self, gate_noise=GATE_NOISES)
        return Gate(groups, self.initial_temperature, self.final_temperature, heads, self.gate_noise)


class GatedFuser(Fuser):
    """Base of fusers that compute in groups behind gates: set :attr:`gate` and write :meth:`residual`.

    Attributes:
        gate: One for every group, or for every layer, whose keys and values it switches together; None: always open.
        parts: What is fused, ``key``, ``value`` or both.
    """

    gate: Gate | None
    parts: Sequence[str] = PARTS
    _recompute = False

    def residual(self, *, receiver: Tensor, sharer: Tensor, gate: Tensor) -> Tensor:
        """The equation: what is added to the receiver's cache.

        Args:
            receiver: ``(G, N, C_r)``, the keys, or values, of a receiver layer for each group
                (:mod:`kvfuse.fusers.groups`).
            sharer: ``(G, N, C_s)``, those of the sharer layer that feeds it.
            gate: ``(G, N, H)``, or what broadcasts to it.

        Returns:
            ``(G, N, C_r)``, exactly zero where the gate is.
        """
        if not hasattr(self, "network"):
            raise NotImplementedError
        # The contract of 0.1, for one version: network(sharer, receiver) -> residual, weights of heads or None.
        warnings.warn("write residual(*, receiver, sharer, gate) instead of network", DeprecationWarning, stacklevel=2)
        projected, weight = self.network(sharer, receiver)
        return scale_heads(projected, gate if weight is None else gate * weight)

    def forward(self, *, receiver: KV, sharer: KV) -> KV:
        """See :meth:`Fuser.forward`."""
        return run(self, receiver=receiver, sharer=sharer)

    def sharer_groups(self, sharer: KV, groups: Sequence[int] | None = None) -> Tensor:
        """The sharer's input of :meth:`residual`, ``(G, N, C_s)``, for all groups or for some, ascending."""
        return to_groups(sharer, layers=self.sharer_layers, parts=self.parts, groups=groups)

    def switch(self, tokens: int = 1, heads: int = 1) -> Tensor:
        """The gates, ``(gates, N, H)`` or what broadcasts to it."""
        if self.gate is None:
            return next(self.parameters()).new_ones(1, 1, 1)
        return self.gate(tokens, heads)

    def open_gate_groups(self) -> tuple[list[int], int]:
        """Numbers of the gate groups that are open, and how many gate groups there are."""
        if self.gate is None:
            count = len(self.parts) * self.config.receiver_kv.num_layers
            return list(range(count)), count
        return self.gate.opened(), len(self.gate.logit)

    @property
    def recompute(self) -> bool:
        """See :class:`Fuser`."""
        return self._recompute

    @recompute.setter
    def recompute(self, wanted: bool) -> None:
        self._recompute = wanted
        for part in self.modules():
            if isinstance(part, GroupedFFN):
                part.recompute = wanted

    def set_progress(self, share: float) -> None:
        """Anneal the gates."""
        if self.gate is not None:
            self.gate.anneal(share)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The gate logits."""
        return [] if self.gate is None else [self.gate.logit]

    def open_gates(self) -> dict[str, Tensor]:
        """The open gates, per layer, or per layer and head."""
        if self.gate is None:
            return {}
        by_layer = len(self.parts) == 2 and len(self.gate.logit) == self.config.receiver_kv.num_layers
        return self.gate.by_part(("layer",) if by_layer else self.parts)
