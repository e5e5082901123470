"""KV-caches as tensors: read them from and write them to transformers' caches. The only file that knows their format."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from kvfuse.cache.preallocated import LayerStack, PreallocatedLayer, stacked_layers
from kvfuse.errors import PairError

CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""What models and ``generate`` call the cache that they are given; transformers renamed it in 5.24."""

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, ``(B, H, T, D)``."""


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
        """Pick single tokens out of a batch.

        Args:
            rows: ``(N,)`` int64, the batch row of each.
            positions: ``(N,)`` int64, its position in that row.

        Returns:
            ``(L, 1, H, N, D)``: the tokens side by side as one row; those of one stretch without a copy.
        """
        stretch = _stretch(rows, positions)
        if stretch is not None:
            return type(self)(*(part[:, stretch[0], :, stretch[1]] for part in (self.key, self.value)))
        rows, positions = rows.to(self.key.device), positions.to(self.key.device)
        return type(self)(
            *(part[:, rows, :, positions].permute(1, 2, 0, 3)[:, None] for part in (self.key, self.value))
        )

    def add_tokens(self, rows: Tensor, positions: Tensor, residual: "KV") -> Self:
        """A copy with ``residual`` ``(L, 1, H, N, D)`` added at the tokens that :meth:`tokens` picks, in this KV's dtype."""
        rows, positions = rows.to(self.key.device), positions.to(self.key.device)
        parts = []
        for part, added in ((self.key, residual.key), (self.value, residual.value)):
            added = added[:, 0].permute(2, 0, 1, 3).to(part)  # (N, L, H, D)
            by_token = part.permute(1, 3, 0, 2, 4)  # (B, T, L, H, D)
            parts.append(by_token.index_put((rows, positions), added, accumulate=True).permute(2, 0, 3, 1, 4))
        return type(self)(*parts)

    def add_tokens_(self, rows: Tensor, positions: Tensor, residual: "KV") -> Self:
        """As :meth:`add_tokens`, in place; each token may be named once."""
        stretch = _stretch(rows, positions)
        if stretch is None:
            rows, positions = rows.to(self.key.device), positions.to(self.key.device)
        for part, added in ((self.key, residual.key), (self.value, residual.value)):
            if stretch is not None:
                part[:, stretch[0], :, stretch[1]] += added.to(part)
            else:
                by_token = part.permute(1, 3, 0, 2, 4)  # (B, T, L, H, D)
                by_token[rows, positions] += added[:, 0].permute(2, 0, 1, 3).to(part)
        return self

    def clone(self) -> Self:
        return type(self)(self.key.clone(), self.value.clone())

    def split(self, tokens: int) -> list[Self]:
        """In pieces of so many tokens, without a copy."""
        return [
            type(self)(*parts) for parts in zip(self.key.split(tokens, 3), self.value.split(tokens, 3), strict=True)
        ]

    def zeros_like(self) -> Self:
        return type(self)(torch.zeros_like(self.key), torch.zeros_like(self.value))


def _stretch(rows: Tensor, positions: Tensor) -> tuple[slice, slice] | None:
    """Tokens on the CPU that follow one another in one row, as slices of rows and of positions; None: they do not."""
    if (
        rows.device.type != "cpu"
        or not len(rows)
        or bool((rows != rows[0]).any())
        or bool((positions.diff() != 1).any())
    ):
        return None
    row, first = int(rows[0]), int(positions[0])
    return slice(row, row + 1), slice(first, first + len(positions))


def concatenate(pieces: Sequence[KV]) -> KV:
    """:meth:`KV.split` undone."""
    return KV(torch.cat([piece.key for piece in pieces], 3), torch.cat([piece.value for piece in pieces], 3))


def empty_cache(config: PreTrainedConfig, more: int = 0) -> DynamicCache:
    """A cache to prefill into that keeps every position, also in layers with a sliding window, all layers side by side.

    Masks stay right: transformers sizes them from the cache. :func:`write_cache` restores the windows.

    Args:
        config: The model's own configuration.
        more: Tokens that are known to come behind those of the first run.
    """
    cache = DynamicCache(config=config)
    attention = [i for i, layer in enumerate(cache.layers) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)]
    beside = LayerStack(len(attention), more)
    for place, i in enumerate(attention):
        cache.layers[i] = PreallocatedLayer(beside, place, windowed=type(cache.layers[i]) is not DynamicLayer)
    return cache


def is_plain(config: PreTrainedConfig) -> bool:
    """Whether all layers of :func:`empty_cache` keep every position, and nothing beside keys and values."""
    return all(type(layer) is PreallocatedLayer for layer in empty_cache(config).layers)


def read_layers(cache: Cache) -> Layers:
    """Keys and values of each layer of a cache of plain layers, on its own device, without a copy."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def copy_layers(layers: Layers) -> Layers:
    """Of the tokens alone, not of the room behind them."""
    return [(key.clone(), value.clone()) for key, value in layers]


def start_cache(config: PreTrainedConfig, layers: Layers, tokens: int, more: int) -> DynamicCache:
    """A new cache with copies of the first tokens of some layers, to be read on from.

    Args:
        config: The model's own configuration.
        layers: What :func:`read_layers` gives.
        tokens: How many of them.
        more: How many will be read then.
    """
    cache = empty_cache(config, more)
    for place, (key, value) in enumerate(layers):
        cache.update(key[:, :, :tokens], value[:, :, :tokens], place)
    return cache


def copy_stacked(config: PreTrainedConfig, kv: KV) -> DynamicCache:
    """A copy of ``kv`` ``(L, B, H, T, D)`` as :func:`empty_cache` would hold it, for a model of plain layers; not layer by layer."""
    cache = empty_cache(config)
    cache.layers[0].beside.fill(kv.key, kv.value)
    for layer in cache.layers:
        layer.take(kv.key.shape[3])
    return cache


def read_cache(cache: Cache, last: int = 0) -> KV:
    """Stack the layers of a cache that hold keys and values; those that were prefilled side by side without a copy.

    Args:
        cache: Any of transformers'; a static one is read up to its end, filled or not.
        last: Only so many positions at the end; by default all.

    Raises:
        PairError: The model keeps no keys and values, or layers of different shapes.
    """
    layers = [cache.layers[i] for i in _kv_layers(cache)]
    shapes = {(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in layers}
    if len(shapes) != 1:
        got = "none" if not shapes else f"layers of {len(shapes)} shapes, such as {sorted(shapes)[:2]}"
        raise PairError(
            f"expected a model with a KV-cache of one shape in all its attention layers, got {got}; use another model"
        )
    together = stacked_layers(layers)
    if together is not None:
        return KV(*(part[..., -last:, :] for part in together))
    device = layers[0].keys.device
    return KV(
        *(
            torch.stack([getattr(layer, part)[:, :, -last:].to(device) for layer in layers])
            for part in ("keys", "values")
        )
    )


def write_cache(
    config: PreTrainedConfig, prefilled: Cache, kv: KV, max_cache_len: int | None = None, take_over: bool = False
) -> Cache:
    """A cache to decode from: ``kv`` in the layers that hold keys and values, everything else as it was prefilled.

    Args:
        config: The model's own configuration.
        prefilled: The cache that ``kv`` was read from; it is left untouched.
        kv: What to write, ``(L, B, H, T, D)``.
        max_cache_len: Make it a static cache with room for so many positions; by default it grows.
        take_over: Nobody needs ``prefilled`` any more: layers that hold ``kv``, because it was changed in place, go on without a copy.
    """
    if take_over and max_cache_len is None and _is_in_place(prefilled, kv):
        return prefilled
    cache = (
        DynamicCache(config=config)
        if max_cache_len is None
        else StaticCache(config=config, max_cache_len=max_cache_len)
    )
    cache.layers += [DynamicLayer() for _ in prefilled.layers[len(cache.layers) :]]
    for i, layer in enumerate(prefilled.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):  # its state changes in place
            cache.layers[i] = copy.deepcopy(layer)
        elif not is_filled(layer):
            cache.layers[i] = layer
    for i, key, value in zip(_kv_layers(prefilled), kv.key, kv.value, strict=True):
        layer, own = cache.layers[i], prefilled.layers[i]
        key, value = key.to(own.keys.device), value.to(own.keys.device)
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.keys, layer.values = key, value
        else:
            layer.update(key, value)  # a windowed layer keeps what it needs
    return cache


def _is_in_place(prefilled: Cache, kv: KV) -> bool:
    """Whether a cache holds ``kv`` itself, in layers that all keep every position, as transformers' own do."""
    plain = all(type(layer) is PreallocatedLayer and not layer.windowed for layer in prefilled.layers)
    together = stacked_layers(prefilled.layers) if plain else None
    return together is not None and together[0].data_ptr() == kv.key.data_ptr() and together[0].shape == kv.key.shape


def read_only_cache(prefilled: Cache, kv: KV) -> Cache:
    """``kv`` in front of one run, which leaves nothing behind: no copy is made, and the run may be repeated.

    Args:
        prefilled: The cache that ``kv`` was read from; it is left untouched.
        kv: ``(L, B, H, T, D)``.
    """
    layers = [
        copy.deepcopy(layer) if isinstance(layer, LinearAttentionCacheLayerMixin) else layer
        for layer in prefilled.layers
    ]
    for i, key, value in zip(_kv_layers(prefilled), kv.key, kv.value, strict=True):
        key, value = key.to(layers[i].keys.device), value.to(layers[i].keys.device)
        if isinstance(layers[i], LinearAttentionCacheLayerMixin):  # whose run can not be repeated
            layers[i].keys, layers[i].values = key, value
        else:
            layers[i] = _Prefix(key, value)
    return Cache(layers=layers)


def cache_of(kv: KV) -> Cache:
    """A read-only cache of ``kv`` ``(L, B, H, T, D)`` for a model whose layers hold keys and values, all of them, and nothing else."""
    return Cache(layers=[_Prefix(key, value) for key, value in zip(kv.key, kv.value, strict=True)])


class _Prefix(DynamicLayer):
    """Keys and values that a run attends to before its own, or before what is staged for it; nothing is stored."""

    staged: tuple[Tensor, Tensor] | None = None

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.keys, self.values = key, value
        self.dtype, self.device, self.is_initialized = key.dtype, key.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = self.staged or (key_states, value_states)
        return torch.cat([self.keys, key.to(key_states)], dim=-2), torch.cat(
            [self.values, value.to(value_states)], dim=-2
        )


def stage(cache: Cache, kv: KV) -> None:
    """Make a model store and attend to ``kv`` for the tokens it reads next, in place of the keys and values it computes.

    Args:
        cache: What the model will be given with those tokens.
        kv: ``(L, B, H, k, D)``, for ``k`` tokens.
    """
    for i, key, value in zip(_kv_layers(cache), kv.key, kv.value, strict=True):
        _stage_layer(cache.layers[i], key, value)


def _stage_layer(layer: Any, key: Tensor, value: Tensor) -> None:
    if isinstance(layer, _Prefix):
        layer.staged = key, value
        return
    store = layer.update

    def update(computed: Tensor, _: Tensor, *args: Any, **kwargs: Any) -> Any:
        del layer.update  # for one run only
        return store(key.to(computed), value.to(computed), *args, **kwargs)

    layer.update = update


def keep_rows(cache: Cache, kept: list[int], held: list[int]) -> None:
    """Forget the last tokens of each row, another number in each, and pad what is left again on the left.

    Args:
        cache: Of a batch padded left; its layers hold keys and values and nothing else.
        kept: How many tokens to keep in each row.
        held: How many there are.
    """
    width, columns = max(kept), torch.arange(max(kept))
    total = cache.get_seq_length()
    starts = torch.tensor([total - there - (width - keep) for keep, there in zip(kept, held, strict=True)])
    index = (columns + starts[:, None]).clamp(min=0)[
        :, None, :, None
    ]  # (B, 1, width, 1); what falls under padding is arbitrary
    for i in _kv_layers(cache):
        layer = cache.layers[i]
        for part in ("keys", "values"):
            tensor = getattr(layer, part)
            setattr(
                layer, part, tensor.gather(2, index.to(tensor.device).expand(-1, tensor.shape[1], -1, tensor.shape[3]))
            )


def has_state(config: PreTrainedConfig) -> bool:
    """Whether a model keeps recurrent state beside keys and values, which cannot be taken back token by token."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers)


def _kv_layers(cache: Cache) -> list[int]:
    return [i for i, layer in enumerate(cache.layers) if is_filled(layer)]


def is_filled(layer: Any) -> bool:
    """Whether a layer of a cache holds keys and values."""
    return getattr(layer, "keys", None) is not None
