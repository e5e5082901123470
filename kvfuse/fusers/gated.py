"""What the kinds with a gate share: its options, its annealing, its parameters and what it tells."""

from collections.abc import Sequence

from torch import Tensor, nn

from kvfuse.fusers.contract import Fuser, FuserConfig, require_choices
from kvfuse.fusers.gate import GATE_NOISES, Gate
from kvfuse.fusers.grouped import PARTS


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
    """Base of the fusers that switch their residual: set :attr:`gate`, and :attr:`parts` where its groups are not keys, then values.

    Attributes:
        gate: One for every group, or None where the residual always counts.
        parts: What the groups of the gate are: all layers of the first, then of the next.
    """

    gate: Gate | None
    parts: Sequence[str] = PARTS

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
