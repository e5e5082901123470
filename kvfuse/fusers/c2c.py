"""The paper's fuser: projection with feature fusion, a weight per head, a gate per layer; each part can be left out."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kvfuse.fusers.base import require_choices, require_uniform
from kvfuse.fusers.gate import GatedConfig, GatedFuser
from kvfuse.fusers.groups import PARTS, scale_heads
from kvfuse.fusers.layers import GroupedFFN, GroupedLinear, HeadWeights, chain

FUSED_PARTS = {"both": PARTS, "keys": ("key",), "values": ("value",)}
GATES = ("layer", "head", "none")


class C2CConfig(GatedConfig):
    """Options of :class:`C2CFuser`; the defaults are the paper's.

    Rows of the paper's ablation (table 8): ``Project`` is ``replace``, without ``receiver_input``, ``feature_fusion``
    and ``weighting``, gate ``none``; ``+ Fuse`` is gate ``none``.

    Attributes:
        hidden_dim: Width of the fuser.
        intermediate_dim: Inner width of its feed-forward blocks.
        num_layers: Depth of the projection, at least 3.
        receiver_input: Whether the projection reads the receiver's cache beside the sharer's.
        feature_fusion: Whether a feed-forward block fuses the two before projection and weighting.
        replace: Whether the projection replaces the receiver's cache instead of being added to it.
        weighting: Whether every token weights its heads.
        parts: ``both`` | ``keys`` | ``values``: what is fused; the residual of the other part is exactly zero.
        gate: ``layer`` (one for its keys, one for its values) | ``head`` (one per KV head of each) | ``none``.
    """

    model_type = "kvfuse-c2c"

    hidden_dim: Annotated[int, Field(ge=1)] = 1024
    intermediate_dim: Annotated[int, Field(ge=1)] = 1024
    num_layers: Annotated[int, Field(ge=3)] = 3
    receiver_input: bool = True
    feature_fusion: bool = True
    replace: bool = False
    weighting: bool = True
    parts: str = "both"
    gate: str = "layer"


class C2CFuser(GatedFuser):
    """``residual = gate * weight * projection(concat(sharer, receiver))`` for the keys and the values of every layer.

    https://arxiv.org/abs/2510.03215, section 3.3.2. The keys and the values of every layer have weights of their own,
    stacked into ``G = 2 L_r`` groups (:mod:`kvfuse.fusers.groups`).
    """

    config_class: ClassVar = C2CConfig
    config: C2CConfig

    def __init__(self, config: C2CConfig) -> None:
        super().__init__(config)
        require_uniform(config)
        require_choices(config, parts=tuple(FUSED_PARTS), gate=GATES)
        receiver, sharer = config.receiver_kv, config.sharer_kv
        self.parts = FUSED_PARTS[config.parts]
        groups, hidden = len(self.parts) * receiver.num_layers, config.hidden_dim
        width = receiver.num_kv_heads * receiver.key_dim

        def block(inner: int) -> GroupedFFN:
            return GroupedFFN(groups, hidden, inner, config.dropout)

        inputs = sharer.num_kv_heads * sharer.key_dim + (width if config.receiver_input else 0)
        self.fusion_in = GroupedLinear(groups, inputs, hidden)
        self.fusion = block(config.intermediate_dim) if config.feature_fusion else None
        self.projection = nn.ModuleList(block(config.intermediate_dim) for _ in range(config.num_layers - 2))
        self.projection_out = GroupedLinear(groups, hidden, width)
        self.weighting = block(hidden) if config.weighting else None
        self.weighting_out = GroupedLinear(groups, hidden, receiver.num_kv_heads) if config.weighting else None
        self.head_weights = HeadWeights()
        heads = receiver.num_kv_heads if config.gate == "head" else 1
        self.gate = None if config.gate == "none" else config.new_gate(groups, heads)
        self.post_init()

    def residual(self, *, receiver: Tensor, sharer: Tensor, gate: Tensor) -> Tensor:
        """See :meth:`GatedFuser.residual`."""
        both = torch.cat([sharer, receiver], dim=-1) if self.config.receiver_input else sharer  # (G, N, C_s + C_r)

        # Feature fusion: what projection and weighting both read.
        hidden = chain(both, self.fusion_in, self.fusion)  # (G, N, hidden)
        # Dynamic weighting: how much each head of the projection counts, token by token.
        weight = (
            self.head_weights(chain(hidden, self.weighting, self.weighting_out)) if self.weighting else 1.0
        )  # (G, N, H)
        # Projection to the receiver's heads.
        projected = chain(hidden, *self.projection, self.projection_out)  # (G, N, H * D)
        if self.config.replace:
            projected = projected - receiver

        return scale_heads(projected, gate * weight)  # (G, N, H * D)

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        for part in (self.fusion_in, self.fusion, *self.projection, self.weighting, self.weighting_out):
            if part is not None:
                part.reset_parameters()
        self.projection_out.reset_parameters(zero=self.config.zero_init)
        if self.gate is not None:
            self.gate.reset_parameters(self.config.gate_init)
