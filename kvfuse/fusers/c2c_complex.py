"""The paper's stronger fuser, C2C-C: a separate network first translates the sharer's cache to the receiver's width."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kvfuse.fusers.base import require_uniform
from kvfuse.fusers.gate import Gate, GatedConfig, GatedFuser
from kvfuse.fusers.groups import scale_heads
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

    hidden_dim: Annotated[int, Field(ge=1)] = 1024
    weight_hidden_dim: Annotated[int, Field(ge=1)] = 1024
    num_layers: Annotated[int, Field(ge=2)] = 3
    weight_temperature: Annotated[float, Field(gt=0)] = 1.0


class C2CComplexFuser(GatedFuser):
    """``residual = gate * weight * combiner(concat(translation(sharer), receiver))`` for every layer.

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

    def residual(self, *, receiver: Tensor, sharer: Tensor, gate: Tensor) -> Tensor:
        """See :meth:`GatedFuser.residual`."""
        translated = self._translate(sharer)  # (2L, N, C_r)
        projected = self.combiner(torch.cat([translated, receiver], dim=-1))  # (2L, N, H * D)
        logits = self._weigh(receiver=receiver, projected=projected)  # (2L, N, H)
        weight = self.head_weights(logits / self.config.weight_temperature)  # (2L, N, H)
        return scale_heads(projected, gate * weight)  # (2L, N, H * D)

    def _translate(self, sharer: Tensor) -> Tensor:
        """``(2L, N, C_s)`` -> ``(2L, N, C_r)``, with a shortcut where both are equally wide."""
        hidden = sharer
        for stage in self.translation:
            hidden = stage(hidden)
        translated = self.translation_out(hidden)
        return translated + sharer if translated.shape == sharer.shape else translated

    def _weigh(self, *, receiver: Tensor, projected: Tensor) -> Tensor:
        """Logits ``(2L, N, H)`` from the receiver's and the projected keys, side by side within each head."""
        heads = self.config.receiver_kv.num_kv_heads
        keys = [groups[: len(groups) // 2].unflatten(-1, (heads, -1)) for groups in (receiver, projected)]
        features = torch.cat(keys, dim=-1).flatten(2)  # (L, N, 2 * H * D)
        hidden = F.gelu(self.weighting_norm(self.weighting_in(features)))
        hidden = F.dropout(hidden, self.config.dropout, self.training)
        return self.weighting_out(self.weighting(hidden).repeat(2, 1, 1))  # keys weigh the values too


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
