"""The paper's fuser: projection with feature fusion, weighting per head, a gate per layer."""

from typing import ClassVar

import torch
from torch import nn

from kvfuse.fusers.contract import Fuser, FuserConfig, require_uniform
from kvfuse.fusers.gate import Gate
from kvfuse.fusers.grouped import GroupedFFN, GroupedLinear, from_groups, to_groups
from kvfuse.kv_cache import KV


class C2CConfig(FuserConfig):
    """Options of :class:`C2CFuser`; defaults are the paper's.

    Attributes:
        hidden_dim: Width of the fuser.
        intermediate_dim: Inner width of its feed-forward blocks.
        num_layers: Depth of the projection, at least 3.
        dropout: In the feed-forward blocks.
        gate_init: Initial gate logit.
        initial_temperature: Of the gates, at the start of training.
        final_temperature: At its end.
        zero_init: Start from a residual of zero.
    """

    model_type = "kvfuse-c2c"

    hidden_dim: int = 1024
    intermediate_dim: int = 1024
    num_layers: int = 3
    dropout: float = 0.1
    gate_init: float = 0.0
    initial_temperature: float = 1.0
    final_temperature: float = 0.001
    zero_init: bool = False


class C2CFuser(Fuser):
    """``residual = gate * weight * projection(concat(sharer, receiver))``, for all layers, keys and values, at once.

    https://arxiv.org/abs/2510.03215, section 3.3.2. Every layer has weights of its own for keys and for values; they are
    stacked into ``G = 2 L_r`` groups, keys first.
    """

    config_class: ClassVar = C2CConfig
    config: C2CConfig

    def __init__(self, config: C2CConfig) -> None:
        super().__init__(config)
        require_uniform(config)
        receiver, sharer = config.receiver_kv, config.sharer_kv
        groups, hidden = 2 * receiver.num_layers, config.hidden_dim
        width = receiver.num_kv_heads * receiver.key_dim

        def block(inner: int) -> GroupedFFN:
            return GroupedFFN(groups, hidden, inner, config.dropout)

        self.fusion_in = GroupedLinear(groups, sharer.num_kv_heads * sharer.key_dim + width, hidden)
        self.fusion = block(config.intermediate_dim)
        self.projection = nn.ModuleList(block(config.intermediate_dim) for _ in range(config.num_layers - 2))
        self.projection_out = GroupedLinear(groups, hidden, width)
        self.weighting = block(hidden)
        self.weighting_out = GroupedLinear(groups, hidden, receiver.num_kv_heads)
        self.gate = Gate(groups, config.initial_temperature, config.final_temperature)
        self.post_init()

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        for part in (self.fusion_in, self.fusion, *self.projection, self.weighting, self.weighting_out):
            part.reset_parameters()
        self.projection_out.reset_parameters(zero=self.config.zero_init)
        self.gate.reset_parameters(self.config.gate_init)

    def forward(self, receiver: KV, sharer: KV) -> KV:
        """See :meth:`Fuser.forward`."""
        x = torch.cat([to_groups(sharer, self.sharer_layers), to_groups(receiver)], dim=-1)  # (G, N, C), sharer first
        hidden = self.fusion(self.fusion_in(x))
        weight = torch.sigmoid(self.weighting_out(self.weighting(hidden)))  # (G, N, H)
        for block in self.projection:
            hidden = block(hidden)
        return from_groups(self.projection_out(hidden), self.gate() * weight, like=receiver)

    def set_progress(self, share: float) -> None:
        """Anneal the gates."""
        self.gate.anneal(share)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The gate logits."""
        return [self.gate.logit]
