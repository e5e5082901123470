"""A cache layer with spare capacity: adding a token copies none of those before it."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvfuse.cache.kv import KV

SPARE_TOKENS = 64  # capacity behind the first tokens
GROWTH = 1.5  # of the capacity, when it is used up


class LastLayerRead(Exception):
    """Ends a prefill inside the last layer."""


class LayerStack:
    """Buffers that hold the first tokens of all layers of a cache next to each other, ``(L, B, H, capacity, D)``.

    Args:
        num_layers: How many layers share them.
        extra_tokens: Tokens that are known to follow the first.
    """

    def __init__(self, num_layers: int, extra_tokens: int = 0) -> None:
        self.num_layers, self.extra_tokens = num_layers, extra_tokens
        self.buffers: tuple[Tensor, Tensor] | None = None

    def allocate(self, index: int, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Buffers for the first keys and values of a layer, ``(B, H, T, D)`` each.

        Returns:
            ``(B, H, capacity, D)`` each, or None if layer 0 had another shape, dtype or device.
        """
        if index == 0:
            self.buffers = _buffers(states, self.num_layers, extra_tokens=self.extra_tokens)
        if self.buffers is None:
            return None
        for buffer, part in zip(self.buffers, states, strict=True):
            shape = _shape(part, self.num_layers, self.extra_tokens)
            if (buffer.shape, buffer.dtype, buffer.device) != (shape, part.dtype, part.device):
                return None
        keys, values = self.buffers
        return keys[index], values[index]

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Copy the first tokens of all layers ``(L, B, H, T, D)``, in one copy each."""
        self.buffers = _buffers((keys[0], values[0]), len(keys), extra_tokens=self.extra_tokens)
        for buffer, tokens in zip(self.buffers, (keys, values), strict=True):
            buffer[..., : tokens.shape[3], :] = tokens


class PreallocatedLayer(DynamicLayer):
    """transformers' layer of full attention, with spare capacity behind its keys and values.

    Args:
        stack: Holds its first tokens; left when they outgrow it, or when rows are reordered.
        index: The layer's number in the stack.
        windowed: Whether transformers' own layer would keep the last tokens only.
    """

    def __init__(self, stack: LayerStack, index: int, windowed: bool = False) -> None:
        super().__init__()
        self.stack: LayerStack | None = stack
        self.index, self.windowed = index, windowed
        self.ends_run = False  # whether the next update is all that a run is for
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Called by transformers: add ``(B, H, k, D)`` and return all tokens."""
        states = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(*states)
        length = self.keys.shape[2] if self.keys.numel() else 0
        total = length + key_states.shape[2]
        # 1) Buffers: from the stack at first, a layer's own when these are full or no longer hold its tokens.
        if length == 0:
            self.buffers = self.stack.allocate(self.index, states) if self.stack is not None else None
        if self.buffers is None or total > self.buffers[0].shape[2] or not (length == 0 or self.is_in_place):
            self._move(length, total, states)
        # 2) Write behind what is there.
        assert self.buffers is not None
        for buffer, part in zip(self.buffers, states, strict=True):
            buffer[:, :, length:total] = part
        held = self.hold(total)
        if self.ends_run:
            self.ends_run = False
            raise LastLayerRead
        return held

    def hold(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Make the first tokens of the buffers the layer's keys and values."""
        assert self.buffers is not None
        self.keys, self.values = (buffer[:, :, :tokens] for buffer in self.buffers)
        return self.keys, self.values

    def take(self, tokens: int) -> None:
        """Hold the first tokens that :meth:`LayerStack.fill` has copied."""
        assert self.stack is not None
        assert self.stack.buffers is not None
        keys, values = self.stack.buffers
        self.buffers = keys[self.index], values[self.index]
        self.lazy_initialization(*self.buffers)
        self.hold(tokens)

    @property
    def is_in_place(self) -> bool:
        """Whether keys and values are the first tokens of the buffers: rows were neither selected nor reordered."""
        if self.buffers is None:
            return False
        return all(
            held.data_ptr() == buffer.data_ptr()
            and held.shape[:2] == buffer.shape[:2]
            and held.stride() == buffer.stride()
            for held, buffer in zip((self.keys, self.values), self.buffers, strict=True)
        )

    def _move(self, length: int, total: int, states: tuple[Tensor, Tensor]) -> None:
        """Copy the tokens into larger buffers outside of the stack."""
        held = (self.keys, self.values) if length else states
        capacity = max(total, int(GROWTH * length)) - held[0].shape[2]
        self.stack = None
        keys, values = _buffers(held, 1, extra_tokens=capacity)
        self.buffers = keys[0], values[0]
        if length:
            for buffer, part in zip(self.buffers, held, strict=True):
                buffer[:, :, :length] = part


def stacked_layers(layers: list[Any]) -> KV | None:
    """The layers of a cache as one view ``(L, B, H, T, D)``; None if they do not share a stack."""
    stack: Any = getattr(layers[0], "stack", None)
    if stack is None or stack.buffers is None or len(layers) != stack.num_layers:
        return None
    tokens = layers[0].keys.shape[2]
    for layer in layers:
        if getattr(layer, "stack", None) is not stack or not layer.is_in_place or layer.keys.shape[2] != tokens:
            return None
    keys, values = stack.buffers
    return KV(keys[..., :tokens, :], values[..., :tokens, :])


def _shape(states: Tensor, num_layers: int, extra_tokens: int) -> tuple[int, ...]:
    batch, heads, tokens, dim = states.shape
    return num_layers, batch, heads, tokens + extra_tokens + SPARE_TOKENS, dim


def _buffers(states: tuple[Tensor, Tensor], num_layers: int, *, extra_tokens: int) -> tuple[Tensor, Tensor]:
    """Empty ``(L, B, H, capacity, D)`` for keys and values that begin with these states."""
    keys, values = (part.new_empty(_shape(part, num_layers, extra_tokens)) for part in states)
    return keys, values
