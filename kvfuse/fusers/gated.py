"""What the kinds with a gate share: its options, its annealing, its parameters and what it tells."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvfuse.errors import PairError
from kvfuse.fusers.contract import Fuser, FuserConfig, require_choices
from kvfuse.fusers.gate import GATE_NOISES, Gate
from kvfuse.fusers.grouped import PARTS
from kvfuse.kv_cache import KV, concatenate

RECOMPUTED_TOKENS = 1024
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
        residual = self._in_pieces(receiver, sharer)
        if self.gate is None:
            return residual
        layers, batch, heads, tokens, _ = receiver.key.shape
        switch = self.gate(batch * tokens, heads)  # (G, B * T or 1, H or 1)
        switch = switch.unflatten(1, (batch, tokens) if switch.shape[1] > 1 else (1, 1)).transpose(2, 3).unsqueeze(-1)
        key, value = switch.chunk(2) if len(switch) > layers else (switch, switch)  # (L, B, H, T, 1), or what broadcasts to it
        return KV(residual.key * key, residual.value * value)

    def stage(self, function: Callable[..., T], *inputs: Any) -> T:
        """``function(*inputs)``, of which training keeps the inputs alone where it recomputes; for the parts of :meth:`ungated`."""
        return checkpoint(function, *inputs, use_reentrant=False) if self.recompute and self.training else function(*inputs)

    def _in_pieces(self, receiver: KV, sharer: KV) -> KV:
        """Where training recomputes, so many tokens at a time that what is inside of them does not grow with the prompt.

        One piece is better than two: of a weight that is used twice, the whole gradient is kept until the second is there.
        """
        pieces = -(-receiver.key.shape[3] // RECOMPUTED_TOKENS)
        if pieces < 2 or not (self.recompute and self.training):
            return self.ungated(receiver, sharer)
        tokens = -(-receiver.key.shape[3] // pieces)
        return concatenate([self.stage(self.ungated, *both) for both in zip(receiver.split(tokens), sharer.split(tokens), strict=True)])

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
        return {} if self.gate is None else self.gate.by_part(self.parts)
