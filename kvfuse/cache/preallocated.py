"""A cache layer that keeps room for tokens to come, so that one more costs no copy of those before it."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

PARTS = ("keys", "values")
ROOM = 64  # tokens, behind those that come first
GROWTH = 1.5


class LayerStack:
    """Where the first tokens of all layers of a cache lie: ``(L, B, H, room, D)`` for keys, and for values.

    Args:
        num_layers: How many layers share it.
        more: Tokens that are known to come behind the first.
    """

    def __init__(self, num_layers: int, more: int = 0) -> None:
        self.num_layers, self.more = num_layers, more
        self.rooms: dict[str, Tensor] = {}

    def room(self, part: str, place: int, like: Tensor) -> Tensor | None:
        """Room for a layer's first tokens ``(B, H, T, D)`` and more; None where they are of another shape or device than others'."""
        batch, heads, tokens, dim = like.shape
        shape = (self.num_layers, batch, heads, tokens + self.more + ROOM, dim)
        rooms = self.rooms.setdefault(part, like.new_empty(shape) if place == 0 else like.new_empty(0))
        fits = (rooms.shape, rooms.dtype, rooms.device) == (shape, like.dtype, like.device)
        return rooms[place] if fits else None

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Lay down the first tokens of all layers ``(L, B, H, T, D)``, in one copy each."""
        for part, tokens in zip(PARTS, (keys, values), strict=True):
            *outer, length, dim = tokens.shape
            self.rooms[part] = tokens.new_empty(*outer, length + self.more + ROOM, dim)
            self.rooms[part][..., :length, :] = tokens


class PreallocatedLayer(DynamicLayer):
    """transformers' layer of full attention, with room behind its keys and values.

    Args:
        beside: Where its first tokens are to lie.
        place: The layer's number there.
        windowed: Whether transformers' own layer would keep the last tokens alone.
    """

    def __init__(self, beside: LayerStack, place: int, windowed: bool = False) -> None:
        super().__init__()
        self.beside: LayerStack | None = beside  # until it has moved out
        self.place, self.windowed = place, windowed
        self._rooms: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}  # what was last given out of the rooms

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """transformers' hook: add ``(B, H, k, D)`` and give all there are."""
        first = not self.is_initialized or self.keys.numel() == 0
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for part, new in zip(PARTS, (key_states, value_states), strict=True):
            if first:
                self._first(part, new)
            else:
                self._more(part, new)
        return self.keys, self.values

    def take(self, tokens: int) -> None:
        """Hold the first tokens that :meth:`LayerStack.fill` has laid down."""
        assert self.beside is not None
        self._rooms = {part: self.beside.rooms[part][self.place] for part in PARTS}
        self.lazy_initialization(*self._rooms.values())
        for part in PARTS:
            self._hold(part, tokens)

    @property
    def is_at_home(self) -> bool:
        """Whether its tokens still lie beside those of the other layers."""
        return self.beside is not None and all(self._is_held(part) for part in PARTS)

    def _first(self, part: str, new: Tensor) -> None:
        room = None if self.beside is None else self.beside.room(part, self.place, new)
        if room is None:
            self.beside = None
            room = new.new_empty(*new.shape[:2], new.shape[2] + ROOM, new.shape[3])
        self._rooms[part] = room
        self._write(part, 0, new)

    def _more(self, part: str, new: Tensor) -> None:
        held, room = getattr(self, part), self._rooms[part]
        length, total = held.shape[2], held.shape[2] + new.shape[2]
        if total > room.shape[2] or not self._is_held(part):  # rows were chosen or interchanged, as by beams
            self.beside = None
            self._rooms[part] = held.new_empty(*held.shape[:2], max(total, int(GROWTH * length)) + ROOM, held.shape[3])
            self._write(part, 0, held)
        self._write(part, length, new)

    def _write(self, part: str, start: int, tokens: Tensor) -> None:
        end = start + tokens.shape[2]
        self._rooms[part][:, :, start:end] = tokens
        self._hold(part, end)

    def _hold(self, part: str, tokens: int) -> None:
        self._held[part] = self._rooms[part][:, :, :tokens]
        setattr(self, part, self._held[part])

    def _is_held(self, part: str) -> bool:
        """Whether the layer's keys, or values, are the first tokens of its room, be it that the last ones were taken back."""
        held, room = getattr(self, part), self._rooms.get(part)
        if room is None or held is self._held[part]:
            return room is not None
        return (
            held.data_ptr() == room.data_ptr() and held.shape[:2] == room.shape[:2] and held.stride() == room.stride()
        )


def stacked_layers(layers: list[Any]) -> tuple[Tensor, Tensor] | None:
    """Keys and values of a cache's layers as one view each, ``(L, B, H, T, D)``; None where they do not lie side by side."""
    together: LayerStack | None = getattr(layers[0], "beside", None)
    if together is None or len(layers) != together.num_layers:
        return None
    if not all(getattr(layer, "beside", None) is together and layer.is_at_home for layer in layers):
        return None
    tokens = layers[0].keys.shape[2]
    return together.rooms["keys"][..., :tokens, :], together.rooms["values"][..., :tokens, :]
