"""The paper's fuser: projection with feature fusion, weighting per head, a gate per layer; each part can be left out."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from kvfuse.errors import PairError
from kvfuse.fusers.base import require_choices, require_uniform
from kvfuse.fusers.gated import GatedConfig, GatedFuser
from kvfuse.fusers.layers import PARTS, GroupedFFN, GroupedLinear, HeadWeights

FUSED_PARTS = {"both": PARTS, "keys": ("key",), "values": ("value",)}
GATES = ("layer", "head", "none")


class C2CConfig(GatedConfig):
    """Options of :class:`C2CFuser`; defaults are the paper's.

    Rows of the paper's ablation (2.8, table 8): ``Project`` is ``replace``, without ``receiver_input``, ``feature_fusion``
    and ``weighting``, gate ``none``; ``+ Fuse`` is gate ``none``.

    Attributes:
        hidden_dim: Width of the fuser.
        intermediate_dim: Inner width of its feed-forward blocks.
        num_layers: Depth of the projection, at least 3.
        receiver_input: Whether the projection reads the receiver's cache beside the sharer's.
        feature_fusion: Whether a feed-forward block fuses the two before projection and weighting.
        replace: Whether the projection takes the place of the receiver's cache instead of being added to it.
        weighting: Whether every token weights its heads.
        parts: ``both`` | ``keys`` | ``values``: what is fused; the other part's residual is exactly zero.
        gate: ``layer`` (one for its keys, one for its values) | ``head`` (one per KV head of each) | ``none``.
    """

    model_type = "kvfuse-c2c"

    hidden_dim: int = 1024
    intermediate_dim: int = 1024
    num_layers: int = 3
    receiver_input: bool = True
    feature_fusion: bool = True
    replace: bool = False
    weighting: bool = True
    parts: str = "both"
    gate: str = "layer"


class C2CFuser(GatedFuser):
    """``residual = gate * weight * projection(concat(sharer, receiver))``, for all layers, keys and values, at once.

    https://arxiv.org/abs/2510.03215, section 3.3.2. Every layer has weights of its own for keys and for values; they are
    stacked into ``G = 2 L_r`` groups, keys first.
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

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        for part in (self.fusion_in, self.fusion, *self.projection, self.weighting, self.weighting_out):
            if part is not None:
                part.reset_parameters()
        self.projection_out.reset_parameters(zero=self.config.zero_init)
        if self.gate is not None:
            self.gate.reset_parameters(self.config.gate_init)

    def network(self, theirs: Tensor, mine: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`GatedFuser.network`."""
        hidden = self.stage(self._fuse_features, theirs, mine)
        weight, projected = self.stage(self._weigh, hidden), self.stage(self._project, hidden)
        return projected - mine if self.config.replace else projected, weight

    @torch.no_grad()
    def start_from(self, weight: Tensor, bias: Tensor) -> None:
        """See :meth:`GatedFuser.start_from`: the map is the first layer's, all blocks begin as the identity."""
        _, inputs, width = weight.shape
        if (
            self.fusion_in.weight.shape[1] != inputs
            or len(self.parts) < 2
            or self.config.hidden_dim < width
            or self.config.replace
        ):
            raise PairError(
                f"expected a fuser of both caches, keys and values, at least {width} wide, to start from a linear map, got other options; "
                "start at random"
            )
        for block in (self.fusion, *self.projection):
            if block is not None:
                block.zero_output_()
        self.fusion_in.place(weight, bias)
        self.projection_out.reset_parameters(zero=True)
        half = 1.0
        if self.weighting_out is not None:
            self.weighting_out.reset_parameters(zero=True)  # every weight is sigmoid(0)
            half = 0.5
        self.projection_out.place(torch.eye(width).to(weight).expand(len(weight), -1, -1) / half)

    def _fuse_features(self, theirs: Tensor, mine: Tensor) -> Tensor:
        """``(G, N, hidden)`` of both caches, or of the sharer's alone."""
        hidden = self.fusion_in(
            torch.cat([theirs, mine], dim=-1) if self.config.receiver_input else theirs
        )  # sharer first
        return hidden if self.fusion is None else self.fusion(hidden)

    def _project(self, hidden: Tensor) -> Tensor:
        """``(G, N, hidden)`` -> ``(G, N, H * D)``."""
        for block in self.projection:
            hidden = block(hidden)
        return self.projection_out(hidden)

    def _weigh(self, hidden: Tensor) -> Tensor | None:
        """``(G, N, hidden)`` -> ``(G, N, H)``; None where tokens do not weight their heads."""
        if self.weighting is None or self.weighting_out is None:
            return None
        return self.head_weights(self.weighting.into(self.weighting_out, hidden))
