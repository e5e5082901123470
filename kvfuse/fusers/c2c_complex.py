"""The paper's stronger fuser, C2C-C: the sharer's cache is first brought to the receiver's width by a network of its own."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvfuse.fusers.base import require_uniform
from kvfuse.fusers.gate import Gate
from kvfuse.fusers.gated import GatedConfig, GatedFuser
from kvfuse.fusers.layers import GroupedLayerNorm, GroupedLinear, GroupedSwiGLU, HeadWeights


class C2CComplexConfig(GatedConfig):
    """Options of :class:`C2CComplexFuser`; defaults are those of the authors' recipe ``all_in_one``.

    Attributes:
        hidden_dim: Width of the sharer's network.
        weight_hidden_dim: Width of the weighting.
        num_layers: Depth of the sharer's network, at least 2.
        weight_temperature: Divides the logits of the weights.
    """

    model_type = "kvfuse-c2c-complex"

    hidden_dim: int = 1024
    weight_hidden_dim: int = 1024
    num_layers: int = 3
    weight_temperature: float = 1.0


class C2CComplexFuser(GatedFuser):
    """``residual = gate * weight * combiner(concat(translation(sharer), receiver))``, for all layers at once.

    https://arxiv.org/abs/2510.03215, A.1.3, in the form of the authors' ``AllInOneProjector`` under their recipe
    ``all_in_one``: a layer's keys decide the weights of its values too, and one gate switches both.
    """

    config_class: ClassVar = C2CComplexConfig
    config: C2CComplexConfig
    gate: Gate  # one switches a layer's keys and values

    def __init__(self, config: C2CComplexConfig) -> None:
        super().__init__(config)
        require_uniform(config)
        receiver, sharer = config.receiver_kv, config.sharer_kv
        layers, groups = receiver.num_layers, 2 * receiver.num_layers
        width = receiver.num_kv_heads * receiver.key_dim
        widths = [sharer.num_kv_heads * sharer.key_dim, *[config.hidden_dim] * (config.num_layers - 1)]
        self.translation = nn.ModuleList(
            _Stage(groups, inputs, config.hidden_dim, config.dropout) for inputs in widths[:-1]
        )
        self.translation_out = GroupedLinear(groups, widths[-1], width)
        self.combiner = GroupedLinear(groups, 2 * width, width)
        self.weighting_in = GroupedLinear(layers, 2 * width, config.weight_hidden_dim)
        self.weighting_norm = GroupedLayerNorm(layers, config.weight_hidden_dim)
        self.weighting = GroupedLinear(layers, config.weight_hidden_dim, config.weight_hidden_dim)
        self.weighting_out = GroupedLinear(groups, config.weight_hidden_dim, receiver.num_kv_heads)
        self.head_weights = HeadWeights()
        self.gate = config.new_gate(layers)
        self.post_init()

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        for part in (
            *self.translation,
            self.translation_out,
            self.weighting_in,
            self.weighting_norm,
            self.weighting,
            self.weighting_out,
        ):
            part.reset_parameters()
        self.combiner.reset_parameters(zero=self.config.zero_init)
        self.gate.reset_parameters(self.config.gate_init)

    def network(self, theirs: Tensor, mine: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`GatedFuser.network`."""
        projected = self.combiner(torch.cat([self._translate(theirs), mine], dim=-1))
        logits = self._weigh(mine, projected, self.config.receiver_kv.num_kv_heads)
        return projected, self.head_weights(logits / self.config.weight_temperature)

    def _translate(self, theirs: Tensor) -> Tensor:
        """``(2L, N, C_s)`` -> ``(2L, N, C_r)``, with a shortcut where both are equally wide."""
        hidden = theirs
        for stage in self.translation:
            hidden = stage(hidden)
        translated = self.translation_out(hidden)
        return translated + theirs if translated.shape == theirs.shape else translated

    def _weigh(self, mine: Tensor, projected: Tensor, heads: int) -> Tensor:
        """Logits ``(2L, N, H)`` from the receiver's and the projected keys, side by side within each head."""
        keys = [part[: len(part) // 2].unflatten(-1, (heads, -1)) for part in (mine, projected)]
        features = torch.cat(keys, dim=-1).flatten(2)
        hidden = F.dropout(F.gelu(self.weighting_norm(self.weighting_in(features))), self.config.dropout, self.training)
        return self.weighting_out(self.weighting(hidden).repeat(2, 1, 1))


class _Stage(nn.Module):
    """SwiGLU, LayerNorm and dropout, per group."""

    def __init__(self, groups: int, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.swiglu = GroupedSwiGLU(groups, inputs, outputs)
        self.norm = GroupedLayerNorm(groups, outputs)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        self.swiglu.reset_parameters()
        self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.swiglu(x)))
