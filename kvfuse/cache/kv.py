"""Keys and values as tensors, layers stacked; and their shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVSpec:
    """The shape of one token's KV-cache.

    Attributes:
        num_layers: Layers that hold keys and values (a hybrid model has others too, which are not counted).
        num_kv_heads: Heads per layer after grouping (GQA).
        key_dim: Dimension of one key head.
        value_dim: Dimension of one value head.
    """

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int

    def __str__(self) -> str:
        dims = f"{self.key_dim}" if self.key_dim == self.value_dim else f"{self.key_dim}/{self.value_dim}"
        return f"{self.num_layers} layers x {self.num_kv_heads} KV heads x {dims}"


@dataclass(frozen=True)
class KV:
    """Keys and values of a stretch of tokens, layers stacked.

    Attributes:
        key: ``(L, B, H, T, D)``, as the cache holds them: after RoPE.
        value: ``(L, B, H, T, D)``.
    """

    key: Tensor
    value: Tensor

    @property
    def spec(self) -> KVSpec:
        num_layers, _, num_kv_heads, _, key_dim = self.key.shape
        return KVSpec(num_layers, num_kv_heads, key_dim, self.value.shape[-1])

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        return type(self)(self.key.to(device, dtype), self.value.to(device, dtype))

    def tokens(self, rows: Tensor, positions: Tensor) -> Self:
        """Select single tokens of a batch.

        Args:
            rows: ``(N,)`` int64, the batch row of each token.
            positions: ``(N,)`` int64, its position in that row.

        Returns:
            ``(L, 1, H, N, D)``: the tokens side by side as one row; a view if they follow one another in one row.
        """
        index = _contiguous(rows, positions)
        if index is not None:
            return type(self)(*(part[:, index[0], :, index[1]] for part in (self.key, self.value)))
        rows, positions = rows.to(self.key.device), positions.to(self.key.device)
        parts = (part[:, rows, :, positions] for part in (self.key, self.value))  # (N, L, H, D)
        return type(self)(*(part.permute(1, 2, 0, 3)[:, None] for part in parts))

    def add_tokens(self, rows: Tensor, positions: Tensor, residual: "KV") -> Self:
        """A copy with ``residual`` ``(L, 1, H, N, D)`` added to the tokens that :meth:`tokens` selects."""
        rows, positions = rows.to(self.key.device), positions.to(self.key.device)
        parts = []
        for part, added in ((self.key, residual.key), (self.value, residual.value)):
            added = added[:, 0].permute(2, 0, 1, 3).to(part)  # (N, L, H, D)
            by_token = part.permute(1, 3, 0, 2, 4)  # (B, T, L, H, D)
            parts.append(by_token.index_put((rows, positions), added, accumulate=True).permute(2, 0, 3, 1, 4))
        return type(self)(*parts)

    def add_tokens_(self, rows: Tensor, positions: Tensor, residual: "KV") -> Self:
        """As :meth:`add_tokens`, in place; no token may be named twice."""
        index = _contiguous(rows, positions)
        if index is None:
            rows, positions = rows.to(self.key.device), positions.to(self.key.device)
        for part, added in ((self.key, residual.key), (self.value, residual.value)):
            if index is not None:
                part[:, index[0], :, index[1]] += added.to(part)
            else:
                by_token = part.permute(1, 3, 0, 2, 4)  # (B, T, L, H, D)
                by_token[rows, positions] += added[:, 0].permute(2, 0, 1, 3).to(part)
        return self

    def clone(self) -> Self:
        return type(self)(self.key.clone(), self.value.clone())

    def split(self, tokens: int) -> list[Self]:
        """Pieces of a number of tokens each, as views."""
        pieces = zip(self.key.split(tokens, 3), self.value.split(tokens, 3), strict=True)
        return [type(self)(key, value) for key, value in pieces]

    def zeros_like(self) -> Self:
        return type(self)(torch.zeros_like(self.key), torch.zeros_like(self.value))


def concatenate(pieces: Sequence[KV]) -> KV:
    """Undo :meth:`KV.split`."""
    return KV(torch.cat([piece.key for piece in pieces], 3), torch.cat([piece.value for piece in pieces], 3))


def _contiguous(rows: Tensor, positions: Tensor) -> tuple[slice, slice] | None:
    """Slices of rows and positions, for tokens on the CPU that follow one another in one row; else None."""
    if rows.device.type != "cpu" or not len(rows):
        return None
    if bool((rows != rows[0]).any()) or bool((positions.diff() != 1).any()):
        return None
    row, first = int(rows[0]), int(positions[0])
    return slice(row, row + 1), slice(first, first + len(positions))
