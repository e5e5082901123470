"""Grouped linear layers with integers of 8 or 4 bits for weights: a fuser that is only used takes less room, and on many CPUs less time.

Weights are rounded to nearest, symmetrically about zero. A scale is rounded to its own dtype before the weights are divided by it, so
that its rounding costs nothing, in bfloat16 neither.
"""

import copy
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvfuse.errors import PairError
from kvfuse.fusers.execution.by_group import Grouped
from kvfuse.fusers.layers import GroupedLinear

if TYPE_CHECKING:
    from kvfuse.fusers.base import Fuser

AnyFuser = TypeVar("AnyFuser", bound="Fuser")
FULL = "full"
MIN_OUTPUTS = 16  # narrower layers, such as the logits of a fuser's weights, hold next to nothing
BLOCK, MOST, STEPS = 64, 7, 18  # of int4: inputs to a step, the largest level, the longest step; 7 * 18 fits into int8
INT8_CPUS = ("avx512_vnni", "avx_vnni", "amx_int8")  # of torch.cpu.get_capabilities()
AT_ONCE = 2**20  # activations, or weights, so that what is between two operations stays in the processor's cache
EVERY = slice(None)


class QuantizedLinear(Grouped):
    """What stands in for a :class:`GroupedLinear` in a fuser with integer weights: ``weight = scale * integers``.

    All tensors are parameters without a gradient, and have the groups as their first axis. The scale is the first of them,
    since the dtype of a fuser is read off its first parameter. Gradients of inputs flow.

    Attributes:
        scale: One for each output, ``(G, 1, out)`` in the fuser's dtype.
        bias: ``(G, 1, out)`` in the fuser's dtype, or None.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.inputs = inputs
        self.scale = _constant(groups, 1, outputs)
        self.bias = _constant(groups, 1, outputs) if bias else None

    def integers(self, groups: slice = EVERY) -> Tensor:
        """``(G, in, out)`` int8, or those of some groups."""
        raise NotImplementedError

    def rounded(self, weight: Tensor) -> dict[str, Tensor]:
        """All parameters but the bias, by name, for a weight ``(G, in, out)``."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """``(G, in, out)`` in the dtype of the scale, made anew each time."""
        return self.integers().to(self.scale.dtype).mul_(self.scale)

    def reset_parameters(self, zero: bool = False) -> None:
        """Draw as :class:`GroupedLinear` does, and round that."""
        groups, _, outputs = self.scale.shape
        linear = GroupedLinear(groups, self.inputs, outputs, bias=self.bias is not None).to(self.scale)
        linear.reset_parameters(zero)
        state = linear.state_dict()
        self.load_state_dict(self.rounded(state.pop("weight")) | state)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(G, N, in)`` to ``(G, N, out)``: integers are multiplied where that is quick, else floats."""
        if x.device.type == "cpu" and not x.requires_grad and cpu_multiplies_int8():
            return self._by_integers(x)
        weight = self.weight.to(x.dtype)
        return torch.bmm(x, weight) if self.bias is None else torch.baddbmm(self.bias, x, weight)

    def _by_integers(self, x: Tensor) -> Tensor:
        """Tokens are rounded to int8 too, each by a scale of its own; the product of both is exact."""
        length, outputs = x.shape[1], self.scale.shape[2]
        out = x.new_empty(len(x), length, outputs, dtype=torch.float32)
        stride = max(1, AT_ONCE // (self.inputs * max(length, outputs)))
        for start in range(0, len(x), stride):
            groups = slice(start, start + stride)
            scale = x[groups].abs().amax(-1, keepdim=True).float().clamp_min_(1e-30).div_(127)  # (g, N, 1)
            tokens = (x[groups] / scale).round_().to(torch.int8)
            these = out[groups]
            for place, one, integers in zip(these, tokens, self.integers(groups), strict=True):
                place.copy_(torch._int_mm(one, integers))
            these.mul_(scale).mul_(self.scale[groups])
            if self.bias is not None:
                these.add_(self.bias[groups])
        return out.to(x.dtype)


class Int8Linear(QuantizedLinear):
    """-127 … 127, kept as they are: ``levels`` is ``(G, in, out)`` int8."""

    def __init__(self, groups: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(groups, inputs, outputs, bias)
        self.levels = _constant(groups, inputs, outputs, dtype=torch.int8)

    def integers(self, groups: slice = EVERY) -> Tensor:
        return self.levels[groups]

    def rounded(self, weight: Tensor) -> dict[str, Tensor]:
        scale = _scale(weight.abs().amax(1, keepdim=True), 127)
        return {"scale": scale, "levels": _round(weight.float() / scale, 127)}


class Int4Linear(QuantizedLinear):
    """A level of -7 … 7 times a step of 1 … 18, which an output has for every block of inputs.

    ``levels`` is ``(G, blocks, block / 2, out)`` uint8: the first half of a block in the low bits, the second in the high ones.
    ``steps`` is ``(G, blocks, 1, out)`` int8. The last block is filled up with zeros.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(groups, inputs, outputs, bias)
        blocks = -(-inputs // BLOCK)
        self.steps = _constant(groups, blocks, 1, outputs, dtype=torch.int8)
        self.levels = _constant(groups, blocks, -(-inputs // (2 * blocks)), outputs, dtype=torch.uint8)

    def integers(self, groups: slice = EVERY) -> Tensor:
        packed = self.levels[groups].view(torch.int8)
        levels = torch.cat(
            [packed << 4 >> 4, packed >> 4], dim=2
        )  # (G, blocks, block, out); shifts to the right keep the sign
        return levels.mul_(self.steps[groups]).flatten(1, 2)[:, : self.inputs]

    def rounded(self, weight: Tensor) -> dict[str, Tensor]:
        _, blocks, half, _ = self.levels.shape
        padded = F.pad(weight, (0, 0, 0, 2 * half * blocks - self.inputs)).unflatten(1, (blocks, 2 * half))
        largest = padded.abs().amax(2, keepdim=True)  # (G, blocks, 1, out)
        scale = _scale(largest.amax(1, keepdim=True), MOST * STEPS)
        step = scale.float()
        steps = _round(largest / (MOST * step), STEPS).clamp_min_(1)
        low, high = _round(padded.float() / (steps * step), MOST).chunk(2, dim=2)
        return {"scale": scale.squeeze(1), "steps": steps, "levels": (low & 15 | high << 4).view(torch.uint8)}


FORMATS: dict[str, type[Int8Linear | Int4Linear]] = {"int8": Int8Linear, "int4": Int4Linear}
WEIGHTS = (FULL, *FORMATS)


@cache
def cpu_multiplies_int8() -> bool:
    """Whether products of int8 are quick here, and right: without such instructions oneDNN adds up in 16 bits, which overflow.

    Other processors multiply floats, and GPUs too, for which no gain was measured.
    """
    able = torch.cpu.get_capabilities()
    if not (torch.backends.mkldnn.is_available() and any(able.get(name, False) for name in INT8_CPUS)):
        return False
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    return all(bool((torch._int_mm(largest, sign * largest) == sign * 64 * 127**2).all()) for sign in (1, -1))


def quantize_linears_(model: nn.Module, weights: str) -> None:
    """Replace the linear layers of a new model by quantised ones, unless they are narrow; ``weights`` is one of :data:`WEIGHTS`."""
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if weights != FULL and isinstance(module, GroupedLinear)
    ]
    for name, linear in linears:
        groups, inputs, outputs = linear.weight.shape
        if outputs >= MIN_OUTPUTS:
            model.set_submodule(name, FORMATS[weights](groups, inputs, outputs, bias=linear.bias is not None))


@torch.no_grad()
def quantize(fuser: AnyFuser, weights: str) -> AnyFuser:
    """A fuser with integer weights, made of one with full weights, which stays as it is.

    Args:
        fuser: Of any kind with grouped linear layers.
        weights: ``int8`` | ``int4``.

    Raises:
        PairError: There is no such format, the fuser is quantised already, or has nothing to quantise.
    """
    if weights not in FORMATS:
        raise PairError(f"expected weights to be one of {', '.join(FORMATS)}, got {weights!r}; choose one")
    if fuser.config.weights != FULL:
        raise PairError(
            f"expected a fuser with full weights, got one with {fuser.config.weights}; quantise the one it was made of"
        )
    config = copy.deepcopy(fuser.config)
    config.weights = weights
    small, state = type(fuser)(config).to(fuser.device, fuser.dtype), fuser.state_dict()
    layers = {name: layer for name, layer in small.named_modules() if isinstance(layer, QuantizedLinear)}
    if not layers:
        raise PairError(
            f"expected a fuser with grouped linear layers of {MIN_OUTPUTS} outputs or more, got a {config.model_type} without; "
            "leave it as it is"
        )
    for name, layer in layers.items():
        state |= {f"{name}.{key}": tensor for key, tensor in layer.rounded(state.pop(f"{name}.weight")).items()}
    small.load_state_dict(state)
    return small.eval()


def _constant(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def _scale(largest: Tensor, most: int) -> Tensor:
    """What ``most`` is multiplied by to give the largest, in the dtype of that; 1 where it is zero."""
    scale = (largest.float() / most).to(largest.dtype)
    return scale.masked_fill(scale == 0, 1)


def _round(x: Tensor, most: int) -> Tensor:
    """To nearest, int8, from ``-most`` to ``most``."""
    return x.round().clamp_(-most, most).to(torch.int8)
