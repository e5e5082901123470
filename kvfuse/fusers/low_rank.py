"""A small fuser: the paper's three parts behind a bottleneck, about a hundredth of its size."""

from typing import ClassVar

import torch
from torch import Tensor

from kvfuse.fusers.base import require_uniform
from kvfuse.fusers.gate import Gate
from kvfuse.fusers.gated import GatedConfig, GatedFuser
from kvfuse.fusers.layers import GroupedFFN, GroupedLinear, HeadWeights


class LowRankConfig(GatedConfig):
    """Options of :class:`LowRankFuser`.

    Attributes:
        rank: Width of the bottleneck; 40 makes 10 MB in bf16 for Qwen3-0.6B <- Qwen2.5-0.5B, where the paper's makes 956.
    """

    model_type = "kvfuse-low-rank"

    rank: int = 40


class LowRankFuser(GatedFuser):
    """``residual = gate * weight * up(fusion(down(concat(sharer, receiver))))``, for all layers at once.

    The parts of https://arxiv.org/abs/2510.03215, section 3.3.2, without the feed-forward blocks that projection and
    weighting have of their own there: both read the fused features, so that nearly all parameters carry a cache in or out.
    """

    config_class: ClassVar = LowRankConfig
    config: LowRankConfig
    gate: Gate

    def __init__(self, config: LowRankConfig) -> None:
        super().__init__(config)
        require_uniform(config)
        receiver, sharer, rank = config.receiver_kv, config.sharer_kv, config.rank
        groups, width = 2 * receiver.num_layers, receiver.num_kv_heads * receiver.key_dim
        self.down = GroupedLinear(groups, sharer.num_kv_heads * sharer.key_dim + width, rank)
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
        self.up.reset_parameters(zero=self.config.zero_init)
        self.gate.reset_parameters(self.config.gate_init)

    @torch.no_grad()
    def start_from(self, weight: Tensor, bias: Tensor) -> None:
        """See :meth:`GatedFuser.start_from`: as much of the map as the bottleneck lets through, by singular values."""
        left, strength, right = torch.linalg.svd(weight.double(), full_matrices=False)  # (G, C, K), (G, K), (G, K, C_r)
        rank = min(self.config.rank, strength.shape[1])
        root = strength[:, :rank].sqrt()
        self.fusion.zero_output_()
        self.weighting.reset_parameters(zero=True)  # every weight is sigmoid(0), a half
        for part in (self.down, self.up):
            part.reset_parameters(zero=True)
        self.down.place(left[..., :rank] * root[:, None])
        self.up.place(2 * root[..., None] * right[:, :rank], 2 * bias)

    def network(self, theirs: Tensor, mine: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`GatedFuser.network`."""
        features = self.fusion(self.down(torch.cat([theirs, mine], dim=-1)))  # (G, N, rank), sharer first
        return self.up(features), self.head_weights(self.weighting(features))
