"""What the kinds with a gate share: its options, its annealing, its parameters and what it tells."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvfuse.fusers.contract import Fuser, FuserConfig, require_choices
from kvfuse.fusers.gate import GATE_NOISES, Gate
from kvfuse.fusers.grouped import PARTS
from kvfuse.kv_cache import KV, concatenate

RECOMPUTED_TOKENS = 256  # what is kept of so many at a time is small, and the weights' gradients are added up seldom enough


class GatedConfig(FuserConfig):
    """Options of the kinds that are trained behind a gate.

    Attributes:
        dropout: Within the fuser's networks.
        gate_init: Initial gate logit.
        gate_noise: ``logistic`` | ``gumbel``, the reference's (:class:`kvfuse.fusers.gate.Gate`).
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
    """Base of the fusers that switch their residual: set :attr:`gate` and write :meth:`ungated` in place of :meth:`forward`.

    Attributes:
        gate: For every layer, or for all layers of the first of :attr:`parts`, then of the next; None: the residual always counts.
        parts: What the fuser fuses, where that is not keys, then values.
    """

    gate: Gate | None
    parts: Sequence[str] = PARTS

    def ungated(self, receiver: KV, sharer: KV) -> KV:
        """The residual as it is behind an open gate. Arguments and shapes as :meth:`Fuser.forward`."""
        raise NotImplementedError

    def forward(self, receiver: KV, sharer: KV) -> KV:
        """See :meth:`Fuser.forward`; one draw of the gates is for all tokens, however they are computed."""
        residual = self._recomputed(receiver, sharer) if self.recompute and self.training else self.ungated(receiver, sharer)
        if self.gate is None:
            return residual
        layers, batch, heads, tokens, _ = receiver.key.shape
        switch = self.gate(batch * tokens, heads)  # (G, B * T or 1, H or 1)
        switch = switch.unflatten(1, (batch, tokens) if switch.shape[1] > 1 else (1, 1)).transpose(2, 3).unsqueeze(-1)
        key, value = switch.chunk(2) if len(switch) > layers else (switch, switch)  # (L, B, H, T, 1), or what broadcasts to it
        return KV(residual.key * key, residual.value * value)

    def _recomputed(self, receiver: KV, sharer: KV) -> KV:
        """A few tokens at a time, of which nothing but the caches is kept for the backward pass."""
        pieces = zip(receiver.split(RECOMPUTED_TOKENS), sharer.split(RECOMPUTED_TOKENS), strict=True)
        return concatenate([checkpoint(self.ungated, *both, use_reentrant=False) for both in pieces])

    def set_progress(self, share: float) -> None:
        """Anneal the gates."""
        if self.gate is not None:
            self.gate.anneal(share)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The gate logits."""
        return [] if self.gate is None else [self.gate.logit]

    def open_gates(self) -> dict[str, Tensor]:
        """Of what is gated, per layer, or per layer and head."""
        return {} if self.gate is None else self.gate.by_part(self.parts)
