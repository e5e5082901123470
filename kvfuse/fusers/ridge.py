"""A fuser in closed form: the receiver's cache is regressed on the sharer's, no gradient needed."""

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kvfuse.cache.kv import KV
from kvfuse.errors import PairError
from kvfuse.fusers.base import FuserConfig, require_uniform
from kvfuse.fusers.gate import Gate, GatedFuser
from kvfuse.fusers.groups import scale_heads, to_groups
from kvfuse.fusers.layers import GroupedLinear
from kvfuse.fusers.normal_equations import NormalEquations

BATCHES_PER_HELD_OUT = 8  # one of them decides the weights, the others the map


class RidgeConfig(FuserConfig):
    """Options of :class:`RidgeFuser`.

    Attributes:
        rope: A linear map cannot undo a rotation that differs from token to token, so it is taken off.
        num_sources: How many sharer layers each receiver layer reads: the aligned one and its nearest neighbours.
        penalty: Of the ridge, as a share of each input's variance.
        gate_init: Gate logit before it is fitted.
        zero_init: Start from a residual of zero before it is fitted.
    """

    model_type = "kvfuse-ridge"

    rope: str = "removed"
    num_sources: Annotated[int, Field(ge=1)] = 3
    penalty: Annotated[float, Field(gt=0)] = 0.01
    gate_init: float = 0.0
    zero_init: bool = False


class RidgeFuser(GatedFuser):
    """``residual = gate * weight * (map(sharer) - receiver)``, all three in closed form.

    The map is the ridge regression of the receiver's keys, and of its values, on those of the sharer. Taking its place
    outright is the paper's projection only (2.8, table 8), which is weak: all that the map does not explain of the
    receiver's cache is lost. So a head moves towards the mapped cache by ``weight = R^2 (1 - R^2)``, with ``R^2`` the
    share
    of its variance that the map explains on tokens held out: not at all where the map says nothing, nor where it
    repeats what is there. (No theorem: of six such weights the one that served the embedded pair best.) A gate is open
    where its layer's ``R^2`` is above zero, which is where the map beats the mean.
    """

    config_class: ClassVar = RidgeConfig
    config: RidgeConfig
    gate: Gate
    closed_form = True

    def __init__(self, config: RidgeConfig) -> None:
        super().__init__(config)
        require_uniform(config)
        receiver, sharer, count = config.receiver_kv, config.sharer_kv, config.num_sources
        if not 1 <= count <= sharer.num_layers:
            raise PairError(
                f"expected fuser.num_sources from 1 to the sharer's {sharer.num_layers} layers, got {count}; change it"
            )
        firsts = [min(max(layer - count // 2, 0), sharer.num_layers - count) for layer in self.sharer_layers]
        self.sources = [[first + i for first in firsts] for i in range(count)]
        groups, width = 2 * receiver.num_layers, receiver.num_kv_heads * receiver.key_dim
        self.projection = GroupedLinear(groups, count * sharer.num_kv_heads * sharer.key_dim, width)
        self.weight = nn.Parameter(torch.empty(groups, 1, receiver.num_kv_heads))
        self.gate = Gate(groups, initial_temperature=1.0, final_temperature=1.0)
        self.post_init()

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        self.projection.reset_parameters()
        nn.init.constant_(self.weight, 0.0 if self.config.zero_init else 1.0)
        self.gate.reset_parameters(self.config.gate_init)

    def residual(self, *, receiver: Tensor, sharer: Tensor, gate: Tensor) -> Tensor:
        """See :meth:`GatedFuser.residual`."""
        return scale_heads(self.projection(sharer) - receiver, gate * self.weight)  # (G, N, H * D)

    def sharer_groups(self, sharer: KV, groups: Sequence[int] | None = None) -> Tensor:
        """``(G, N, sources * C_s)``: the sharer layers that each receiver layer reads, side by side."""
        sources = [to_groups(sharer, layers=layers, parts=self.parts, groups=groups) for layers in self.sources]
        return torch.cat(sources, dim=-1)

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[KV, KV]]) -> None:
        """See :meth:`Fuser.fit`; every eighth batch, from the second on, is held out."""
        groups, inputs, outputs = self.projection.weight.shape
        fitted, held_out = (NormalEquations(groups, inputs, outputs, self.device) for _ in range(2))
        # 1) Sums over all tokens, some of them held out.
        for number, (receiver, sharer) in enumerate(batches):
            equations = held_out if number % BATCHES_PER_HELD_OUT == 1 else fitted
            equations.add(self.sharer_groups(sharer), to_groups(receiver))
        if not held_out.count:
            raise PairError(
                "expected at least two batches to fit, got fewer; use a smaller train.batch_size or more examples"
            )
        # 2) The map, then how much of the held-out variance it explains.
        weight, bias = fitted.solve(self.config.penalty)
        by_head, by_layer = held_out.explained(weight, bias, self.weight.shape[2])
        by_head = by_head.clamp(0, 1)
        # 3) Both decide the weights of heads, and the gates of layers.
        self.load_state_dict(
            {
                "projection.weight": weight,
                "projection.bias": bias,
                "weight": (by_head * (1 - by_head))[:, None],
                "gate.logit": by_layer[:, None, None],
            }
        )
