"""What the kinds with a gate share: its options, its annealing, its parameters and what it tells."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvfuse.cache.transformers_cache import KV, concatenate
from kvfuse.errors import PairError
from kvfuse.fusers.base import Fuser, FuserConfig, require_choices
from kvfuse.fusers.execution.by_group import cut, fits, has_lanes, is_watched, runs
from kvfuse.fusers.gate import GATE_NOISES, Gate
from kvfuse.fusers.layers import PARTS, GroupedFFN, from_groups, to_groups, write_groups

RECOMPUTED_TOKENS = (
    2048  # of one piece, whose insides are then as large as the gradient that a second piece would keep twice
)
T = TypeVar("T")


class GatedConfig(FuserConfig):
    """Options of the kinds that are trained behind a gate.

    Attributes:
        dropout: Within the fuser's networks.
        gate_init: Initial gate logit.
        gate_noise: ``logistic`` | ``logistic-per-token`` | ``gumbel``, the reference's (:class:`kvfuse.fusers.gate.Gate`).
        initial_temperature: Of the gates, at the start of training.
        final_temperature: At its end.
        zero_init: Start from a projection of zero: from a residual of zero, where nothing is replaced.
    """

    dropout: float = 0.1
    gate_init: float = 0.0
    gate_noise: str = "logistic"
    initial_temperature: float = 1.0
    final_temperature: float = 0.001
    zero_init: bool = False

    def new_gate(self, groups: int, heads: int = 1) -> Gate:
        """A gate for each group, or for each head of a group. Raises PairError where its noise is unknown."""
        require_choices(self, gate_noise=GATE_NOISES)
        return Gate(groups, self.initial_temperature, self.final_temperature, heads, self.gate_noise)


class GatedFuser(Fuser):
    """Base of the fusers that switch their residual: set :attr:`gate` and write :meth:`network` in place of :meth:`forward`.

    Attributes:
        gate: For every layer, or for all layers of the first of :attr:`parts`, then of the next; None: the residual always counts.
        parts: What the fuser fuses, where that is not keys, then values.
    """

    gate: Gate | None
    parts: Sequence[str] = PARTS
    _recompute = False

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

    def network(self, theirs: Tensor, mine: Tensor) -> tuple[Tensor, Tensor | None]:
        """The residual as it is behind an open gate.

        Args:
            theirs: ``(G, N, C_s)``: for each group, all heads of the sharer's keys, or values, side by side.
            mine: ``(G, N, C_r)``, the receiver's.

        Returns:
            The residual ``(G, N, C_r)``, and what weights each of its heads ``(G, N, H)``; None: one.
        """
        raise NotImplementedError

    def sharer_groups(self, sharer: KV, groups: Sequence[int] | None = None) -> Tensor:
        """What :meth:`network` reads of the sharer, ``(G, N, C_s)``, for all groups or some, ascending."""
        return to_groups(sharer, self.sharer_layers, self.parts, groups)

    def forward(self, receiver: KV, sharer: KV) -> KV:
        """See :meth:`Fuser.forward`."""
        return (
            self._trained(receiver, sharer)
            if self.training or torch.is_grad_enabled()
            else self._inferred(receiver, sharer)
        )

    def _trained(self, receiver: KV, sharer: KV) -> KV:
        """All groups at once; one draw of the gates is for all tokens, however they are computed."""
        residual = self._in_pieces(receiver, sharer)
        if self.gate is None:
            return residual
        layers, batch, heads, tokens, _ = receiver.key.shape
        switch = self.gate(batch * tokens, heads)  # (G, B * T or 1, H or 1)
        switch = switch.unflatten(1, (batch, tokens) if switch.shape[1] > 1 else (1, 1)).transpose(2, 3).unsqueeze(-1)
        key, value = (
            switch.chunk(2) if len(switch) > layers else (switch, switch)
        )  # (L, B, H, T, 1), or what broadcasts to it
        return KV(residual.key * key, residual.value * value)

    def _inferred(self, receiver: KV, sharer: KV) -> KV:
        """Some lanes at a time, those behind closed gates never."""
        if is_watched(self) or not has_lanes(self):
            return self._trained(receiver, sharer)
        groups = len(self.parts) * len(receiver.key)
        of = groups if self.gate is None else len(self.gate.logit)
        by_head = self.gate is not None and self.gate.logit.shape[2] > 1
        lanes = self._lanes(of, groups, receiver)
        if lanes == [slice(0, of)] and not by_head:
            return self._ungated(receiver, sharer)
        residual = receiver.zeros_like()
        for some in lanes:
            chosen = [first + lane for first in range(0, groups, of) for lane in range(of)[some]]
            part = cut(self, some, of)
            projected, weight = part.network(
                self.sharer_groups(sharer, chosen), to_groups(receiver, None, self.parts, chosen)
            )
            if by_head and part.gate is not None:
                weight = part.gate() if weight is None else part.gate() * weight
            write_groups(residual, projected, weight, self.parts, chosen)
        return residual

    def _lanes(self, of: int, groups: int, receiver: KV) -> list[slice]:
        """Which lanes to compute, and how many at a time.

        On a CPU it is one after the other where all together would not stay in its cache, elsewhere as many as lie side by side
        (the groups of several lanes of two groups each do so only if they are all there are).
        """
        opened = list(range(of)) if self.gate is None else self.gate.opened()
        large = not fits(receiver.key.device, receiver.key.nbytes + receiver.value.nbytes)
        apart = groups > of and len(opened) < of
        return [slice(lane, lane + 1) for lane in opened] if large or apart else runs(opened)

    def stage(self, function: Callable[..., T], *inputs: Any) -> T:
        """``function(*inputs)``, of which training keeps the inputs alone where it recomputes; for the parts of :meth:`network`."""
        return (
            checkpoint(function, *inputs, use_reentrant=False)
            if self.recompute and self.training
            else function(*inputs)
        )

    def _in_pieces(self, receiver: KV, sharer: KV) -> KV:
        """Where training recomputes, so many tokens at a time that what is inside of them does not grow with the prompt.

        One piece is better than two: of a weight that is used twice, the whole gradient is kept until the second is there.
        """
        pieces = -(-receiver.key.shape[3] // RECOMPUTED_TOKENS)
        if pieces < 2 or not (self.recompute and self.training):
            return self._ungated(receiver, sharer)
        tokens = -(-receiver.key.shape[3] // pieces)
        return concatenate(
            [
                self.stage(self._ungated, *both)
                for both in zip(receiver.split(tokens), sharer.split(tokens), strict=True)
            ]
        )

    def _ungated(self, receiver: KV, sharer: KV) -> KV:
        """All groups at once, behind open gates."""
        projected, weight = self.network(self.sharer_groups(sharer), to_groups(receiver, parts=self.parts))
        return from_groups(projected, weight, receiver, self.parts)

    def start_from(self, weight: Tensor, bias: Tensor) -> None:
        """Begin as a linear map of both caches in place of a random network, behind the gates as they are.

        Args:
            weight: ``(G, C_s + C_r, C_r)``, from the sharer's keys, or values, and the receiver's, side by side; for all layers'
                keys, then values.
            bias: ``(G, 1, C_r)``.

        Raises:
            PairError: This kind, or this one's options, cannot hold such a map.
        """
        raise PairError(
            f"expected a fuser of kind c2c or low-rank to start from a linear map, got {self.config.model_type}; start at random"
        )

    def set_progress(self, share: float) -> None:
        """Anneal the gates."""
        if self.gate is not None:
            self.gate.anneal(share)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The gate logits."""
        return [] if self.gate is None else [self.gate.logit]

    def open_gates(self) -> dict[str, Tensor]:
        """Of what is gated, per layer, or per layer and head."""
        if self.gate is None:
            return {}
        apart = len(self.gate.logit) > self.config.receiver_kv.num_layers or len(self.parts) == 1
        return self.gate.by_part(self.parts if apart else ("layer",))
