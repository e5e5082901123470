"""A cache layer that keeps room for tokens to come, so that one more costs no copy of those before it."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

PARTS = ("keys", "values")
ROOM = 64  # tokens, behind those that come first
GROWTH = 1.5


class SideBySide:
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


class GrowingLayer(DynamicLayer):
    """transformers' layer of full attention, with room behind its keys and values.

    Args:
        beside: Where its first tokens are to lie.
        place: The layer's number there.
    """

    def __init__(self, beside: SideBySide, place: int) -> None:
        super().__init__()
        self.beside: SideBySide | None = beside  # until it has moved out
        self.place = place
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """transformers' hook: add ``(B, H, k, D)`` and give all there are."""
        first = not self.is_initialized or self.keys.numel() == 0
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for part, new in zip(PARTS, (key_states, value_states), strict=True):
            setattr(self, part, self._first(part, new) if first else self._more(part, new))
        return self.keys, self.values

    @property
    def is_at_home(self) -> bool:
        """Whether its tokens still lie beside those of the other layers."""
        rooms = self.beside.rooms if self.beside is not None else {}
        return bool(rooms) and all(rooms[part].numel() and _begins(getattr(self, part), rooms[part][self.place]) for part in PARTS)

    def _first(self, part: str, new: Tensor) -> Tensor:
        room = None if self.beside is None else self.beside.room(part, self.place, new)
        self._rooms[part] = new.new_empty(*new.shape[:2], new.shape[2] + ROOM, new.shape[3]) if room is None else room
        return self._write(part, 0, new)

    def _more(self, part: str, new: Tensor) -> Tensor:
        held, room = getattr(self, part), self._rooms[part]
        length, total = held.shape[2], held.shape[2] + new.shape[2]
        if total > room.shape[2] or not _begins(held, room):  # rows were chosen or interchanged, as by beams
            self.beside = None
            self._rooms[part] = held.new_empty(*held.shape[:2], max(total, int(GROWTH * length)) + ROOM, held.shape[3])
            self._write(part, 0, held)
        return self._write(part, length, new)

    def _write(self, part: str, start: int, tokens: Tensor) -> Tensor:
        room, end = self._rooms[part], start + tokens.shape[2]
        room[:, :, start:end] = tokens
        return room[:, :, :end]


def _begins(held: Tensor, room: Tensor) -> bool:
    """Whether ``held`` are the first tokens of ``room``."""
    return held.data_ptr() == room.data_ptr() and held.shape[:2] == room.shape[:2] and held.stride() == room.stride()


def side_by_side(layers: list[Any]) -> tuple[Tensor, Tensor] | None:
    """Keys and values of a cache's layers as one view each, ``(L, B, H, T, D)``; None where they do not lie side by side."""
    together: SideBySide | None = getattr(layers[0], "beside", None)
    if together is None or len(layers) != together.num_layers:
        return None
    if not all(getattr(layer, "beside", None) is together and layer.is_at_home for layer in layers):
        return None
    tokens = layers[0].keys.shape[2]
    return together.rooms["keys"][..., :tokens, :], together.rooms["values"][..., :tokens, :]
