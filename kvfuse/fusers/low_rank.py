"""A small fuser: the paper's three parts behind a bottleneck, about a hundredth of its size."""

from collections.abc import Iterable
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvfuse.cache.kv import KV
from kvfuse.fusers.base import require_uniform
from kvfuse.fusers.gate import Gate, GatedConfig, GatedFuser
from kvfuse.fusers.groups import scale_heads, to_groups
from kvfuse.fusers.layers import GroupedFFN, GroupedLinear, GroupedStandardize, HeadWeights, chain


class LowRankConfig(GatedConfig):
    """Options of :class:`LowRankFuser`.

    Attributes:
        rank: Width of the bottleneck; 40 makes 10 MB in bf16 for Qwen3-0.6B <- Qwen2.5-0.5B, where the paper's makes
            956.
        standardize: Centre and scale the inputs channel by channel, by their statistics over training prompts.
    """

    model_type = "kvfuse-low-rank"

    rank: Annotated[int, Field(ge=1)] = 40
    standardize: bool = False


class LowRankFuser(GatedFuser):
    """``residual = gate * weight * up(fusion(down(concat(sharer, receiver))))`` for the keys and values of every layer.

    The parts of https://arxiv.org/abs/2510.03215, section 3.3.2, but for the feed-forward blocks of projection and
    weighting: both read the fused features, so that nearly all parameters carry a cache in or out.
    """

    config_class: ClassVar = LowRankConfig
    config: LowRankConfig
    gate: Gate
    standard: GroupedStandardize | None

    def __init__(self, config: LowRankConfig) -> None:
        super().__init__(config)
        require_uniform(config)
        receiver, sharer, rank = config.receiver_kv, config.sharer_kv, config.rank
        groups, width = 2 * receiver.num_layers, receiver.num_kv_heads * receiver.key_dim
        inputs = sharer.num_kv_heads * sharer.key_dim + width
        self.standard = GroupedStandardize(groups, inputs) if config.standardize else None
        self.down = GroupedLinear(groups, inputs, rank)
        self.fusion = GroupedFFN(groups, rank, rank, config.dropout)
        self.weighting = GroupedLinear(groups, rank, receiver.num_kv_heads)
        self.head_weights = HeadWeights()
        self.up = GroupedLinear(groups, rank, width)
        self.gate = config.new_gate(groups)
        self.post_init()

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        for part in (self.down, self.fusion, self.weighting):
            part.reset_parameters()
        if self.standard is not None:
            self.standard.reset_parameters()
        self.up.reset_parameters(zero=self.config.zero_init)
        self.gate.reset_parameters(self.config.gate_init)

    def prepare(self, batches: Iterable[tuple[KV, KV]]) -> None:
        """See :meth:`kvfuse.fusers.base.Fuser.prepare`."""
        if self.standard is not None:
            self.standard.measure(
                torch.cat([self.sharer_groups(sharer), to_groups(receiver, parts=self.parts)], dim=-1)
                for receiver, sharer in batches
            )

    def residual(self, *, receiver: Tensor, sharer: Tensor, gate: Tensor) -> Tensor:
        """See :meth:`GatedFuser.residual`."""
        both = torch.cat([sharer, receiver], dim=-1)  # (G, N, C_s + C_r)
        features = chain(both, self.standard, self.down, self.fusion)  # (G, N, rank)
        weight = self.head_weights(self.weighting(features))  # (G, N, H)
        projected = self.up(features)  # (G, N, H * D)
        return scale_heads(projected, gate * weight)  # (G, N, H * D)
