"""Grouped linear layers with weights of 8 or 4 bits: less room, and on many CPUs less time; for inference.

Weights are rounded to nearest, symmetrically about zero. A scale is rounded to its own dtype before the weights are
divided by it, so that its rounding costs nothing, in bfloat16 neither.
"""

import copy
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from kvfuse.errors import PairError
from kvfuse.fusers.layers import Grouped, GroupedLinear

FuserT = TypeVar("FuserT", bound=PreTrainedModel)
MIN_OUTPUTS = 16  # narrower layers, such as the logits of head weights, hold next to nothing
INT4_BLOCK_INPUTS = 64  # inputs that share a step
INT4_MAX_LEVEL, INT4_MAX_STEP = 7, 18  # their product, 126, fits into int8
INT8_CPU_CAPABILITIES = ("avx512_vnni", "avx_vnni", "amx_int8")  # of torch.cpu.get_capabilities()
ELEMENTS_AT_ONCE = 2**20  # activations or weights, so that intermediates stay in the processor's cache
ALL_GROUPS = slice(None)


class QuantizedLinear(Grouped):
    """A :class:`GroupedLinear` with integer weights: ``weight = scale * integers``.

    All tensors are parameters without a gradient, with the groups as their first axis. The scale is the first of them,
    because the dtype of a fuser is read off its first parameter. Gradients of inputs flow.

    Attributes:
        scale: One per output, ``(G, 1, out)`` in the fuser's dtype.
        bias: ``(G, 1, out)`` in the fuser's dtype, or None.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.inputs = inputs
        self.scale = _constant(groups, 1, outputs)
        self.bias = _constant(groups, 1, outputs) if bias else None

    def integers(self, groups: slice = ALL_GROUPS) -> Tensor:
        """The integers, ``(G, in, out)`` int8, of all groups or some."""
        raise NotImplementedError

    def rounded(self, weight: Tensor) -> dict[str, Tensor]:
        """All parameters but the bias, by name, for a weight ``(G, in, out)``."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """``(G, in, out)`` in the dtype of the scale, computed each time."""
        return self.integers().to(self.scale.dtype).mul_(self.scale)

    def reset_parameters(self, zero: bool = False) -> None:
        """Draw as :class:`GroupedLinear` does, then round."""
        groups, _, outputs = self.scale.shape
        linear = GroupedLinear(groups, self.inputs, outputs, bias=self.bias is not None).to(self.scale)
        linear.reset_parameters(zero)
        state = linear.state_dict()
        self.load_state_dict(self.rounded(state.pop("weight")) | state)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(G, N, in)`` to ``(G, N, out)``: in integers where that is fast, else in floats."""
        if x.device.type == "cpu" and not x.requires_grad and cpu_multiplies_int8():
            return self._multiply_integers(x)
        weight = self.weight.to(x.dtype)
        return torch.bmm(x, weight) if self.bias is None else torch.baddbmm(self.bias, x, weight)

    def _multiply_integers(self, x: Tensor) -> Tensor:
        """Round every token to int8 by a scale of its own; the product of the integers is exact."""
        length, outputs = x.shape[1], self.scale.shape[2]
        out = x.new_empty(len(x), length, outputs, dtype=torch.float32)
        stride = max(1, ELEMENTS_AT_ONCE // (self.inputs * max(length, outputs)))
        for start in range(0, len(x), stride):
            groups = slice(start, start + stride)
            scale = x[groups].abs().amax(-1, keepdim=True).float().clamp_min_(1e-30).div_(127)  # (g, N, 1)
            tokens = (x[groups] / scale).round_().to(torch.int8)  # (g, N, in)
            products = out[groups]
            for product, token, integers in zip(products, tokens, self.integers(groups), strict=True):
                product.copy_(torch._int_mm(token, integers))
            products.mul_(scale).mul_(self.scale[groups])
            if self.bias is not None:
                products.add_(self.bias[groups])
        return out.to(x.dtype)


class Int8Linear(QuantizedLinear):
    """Integers from -127 to 127: ``levels`` is ``(G, in, out)`` int8."""

    def __init__(self, groups: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(groups, inputs, outputs, bias)
        self.levels = _constant(groups, inputs, outputs, dtype=torch.int8)

    def integers(self, groups: slice = ALL_GROUPS) -> Tensor:
        return self.levels[groups]

    def rounded(self, weight: Tensor) -> dict[str, Tensor]:
        scale = _scale(weight.abs().amax(1, keepdim=True), 127)
        return {"scale": scale, "levels": _round(weight.float() / scale, 127)}


class Int4Linear(QuantizedLinear):
    """Integers that are a level from -7 to 7 times a step from 1 to 18, one step per block of inputs and output.

    ``levels`` is ``(G, blocks, block / 2, out)`` uint8: the first half of a block in the low bits, the second in the
    high ones. ``steps`` is ``(G, blocks, 1, out)`` int8. The last block is padded with zeros.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(groups, inputs, outputs, bias)
        blocks = -(-inputs // INT4_BLOCK_INPUTS)
        self.steps = _constant(groups, blocks, 1, outputs, dtype=torch.int8)
        self.levels = _constant(groups, blocks, -(-inputs // (2 * blocks)), outputs, dtype=torch.uint8)

    def integers(self, groups: slice = ALL_GROUPS) -> Tensor:
        packed = self.levels[groups].view(torch.int8)
        levels = torch.cat(
            [packed << 4 >> 4, packed >> 4], dim=2
        )  # (G, blocks, block, out); shifts to the right keep the sign
        return levels.mul_(self.steps[groups]).flatten(1, 2)[:, : self.inputs]

    def rounded(self, weight: Tensor) -> dict[str, Tensor]:
        _, blocks, half, _ = self.levels.shape
        padded = F.pad(weight, (0, 0, 0, 2 * half * blocks - self.inputs)).unflatten(1, (blocks, 2 * half))
        largest = padded.abs().amax(2, keepdim=True)  # (G, blocks, 1, out)
        scale = _scale(largest.amax(1, keepdim=True), INT4_MAX_LEVEL * INT4_MAX_STEP)
        step = scale.float()
        steps = _round(largest / (INT4_MAX_LEVEL * step), INT4_MAX_STEP).clamp_min_(1)
        low, high = _round(padded.float() / (steps * step), INT4_MAX_LEVEL).chunk(2, dim=2)
        return {"scale": scale.squeeze(1), "steps": steps, "levels": (low & 15 | high << 4).view(torch.uint8)}


FORMATS: dict[str, type[Int8Linear | Int4Linear]] = {"int8": Int8Linear, "int4": Int4Linear}


class Quantized:
    """Mixed into the class of a fuser: the large linear layers of a new one are quantised, and it cannot be trained."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        quantize_linears_(self, config.weights)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> Any:
        """As of any module. Raises PairError for training, since the weights have no gradient."""
        if mode:
            require_trainable(self)
        self.requires_grad_(False)  # type: ignore[attr-defined]
        return super().train(mode)  # type: ignore[misc]


@cache
def quantized_class(cls: Any, weights: str) -> type[Any]:
    """The class of quantised fusers of a kind. Raises PairError if there is no such format."""
    if weights not in FORMATS:
        known = ", ".join(("full", *FORMATS))
        raise PairError(f"expected fuser.weights to be one of {known}, got {weights!r}; choose one")
    return type(cls.__name__, (Quantized, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


@cache
def cpu_multiplies_int8() -> bool:
    """Whether products of int8 are fast here, and right: without the instructions oneDNN overflows 16 bits.

    Other processors multiply floats, and so do GPUs, for which no gain was measured.
    """
    able = torch.cpu.get_capabilities()
    if not (torch.backends.mkldnn.is_available() and any(able.get(name, False) for name in INT8_CPU_CAPABILITIES)):
        return False
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    return all(bool((torch._int_mm(largest, sign * largest) == sign * 64 * 127**2).all()) for sign in (1, -1))


def quantize_linears_(model: nn.Module, weights: str) -> None:
    """Replace the linear layers of a new model, except narrow ones; ``weights`` is ``int8`` or ``int4``."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, GroupedLinear)]
    for name, linear in linears:
        groups, inputs, outputs = linear.weight.shape
        if outputs >= MIN_OUTPUTS:
            model.set_submodule(name, FORMATS[weights](groups, inputs, outputs, bias=linear.bias is not None))


@torch.no_grad()
def quantize(fuser: FuserT, weights: str) -> FuserT:
    """A quantised copy of a fuser with full weights.

    Args:
        fuser: Of any kind with grouped linear layers.
        weights: ``int8`` | ``int4``.

    Raises:
        PairError: There is no such format, the fuser is quantised already, or has nothing to quantise.
    """
    if weights not in FORMATS:
        raise PairError(f"expected weights to be one of {', '.join(FORMATS)}, got {weights!r}; choose one")
    if fuser.config.weights != "full":
        raise PairError(
            f"expected a fuser with full weights, got one with {fuser.config.weights}; quantise the one it was made of"
        )
    # 1) A new fuser of the same configuration, its large layers quantised.
    config = copy.deepcopy(fuser.config)
    config.weights = weights
    cls: Any = type(fuser)
    small = quantized_class(cls, weights)(config).to(fuser.device, fuser.dtype)
    layers = {name: layer for name, layer in small.named_modules() if isinstance(layer, QuantizedLinear)}
    if not layers:
        raise PairError(
            f"expected a fuser with grouped linear layers of {MIN_OUTPUTS} outputs or more, "
            f"got a {config.model_type} without; leave it as it is"
        )
    # 2) Their weights rounded, all else as it is.
    state = fuser.state_dict()
    for name, layer in layers.items():
        rounded = layer.rounded(state.pop(f"{name}.weight"))
        state |= {f"{name}.{key}": tensor for key, tensor in rounded.items()}
    small.load_state_dict(state)
    return small.eval()


def require_trainable(fuser: Any) -> None:
    """Refuse a fuser that can only be used. Raises PairError if its weights are integers."""
    weights = fuser.config.weights
    if weights != "full":
        raise PairError(
            f"expected a fuser with full weights to train, got one with {weights}, which have no gradient; "
            "train the one it was made of"
        )


def _constant(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def _scale(largest: Tensor, levels: int) -> Tensor:
    """The scale by which ``levels`` give the largest value, in the dtype of that; 1 where it is zero."""
    scale = (largest.float() / levels).to(largest.dtype)
    return scale.masked_fill(scale == 0, 1)


def _round(x: Tensor, levels: int) -> Tensor:
    """To nearest, int8, from ``-levels`` to ``levels``."""
    return x.round().clamp_(-levels, levels).to(torch.int8)
