"""Read keys and values from transformers' caches and write them back: the only code that knows their format."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from kvfuse.cache.kv import KV
from kvfuse.cache.preallocated import LayerStack, PreallocatedLayer, stacked_layers
from kvfuse.errors import PairError

_ARGUMENTS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _ARGUMENTS else "past_key_values"
"""The argument by which models and ``generate`` take a cache; transformers renamed it in 5.24."""
LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")  # they rotate a token otherwise once the prompt is long

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, ``(B, H, T, D)``."""


def cache_arguments(cache: Cache | None) -> dict[str, Any]:
    """The arguments by which a model reads a cache and goes on from it, whatever its configuration says of caches."""
    return {CACHE: cache, "use_cache": True}


def empty_cache(config: PreTrainedConfig, extra_tokens: int = 0) -> DynamicCache:
    """A cache to prefill into. It keeps every position, also in layers with a sliding window, all layers in one stack.

    Masks stay right: transformers sizes them from the cache. :func:`write_cache` restores the windows.

    Args:
        config: The model's own configuration.
        extra_tokens: Tokens that are known to follow those of the first run.
    """
    cache = DynamicCache(config=config)
    attention = [i for i, layer in enumerate(cache.layers) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)]
    stack = LayerStack(len(attention), extra_tokens)
    for index, i in enumerate(attention):
        cache.layers[i] = PreallocatedLayer(stack, index, windowed=type(cache.layers[i]) is not DynamicLayer)
    return cache


def supports_prefix_reuse(model: PreTrainedModel) -> bool:
    """Whether the cache of a prefix equals the prefix of the longer prompt's cache.

    Not where layers hold more than keys and values (a recurrent state cannot be taken back to an earlier token), nor
    where the length of the prompt decides how keys are rotated.
    """
    ropes = [str(getattr(module, "rope_type", "")) for module in model.modules()]
    plain = all(type(layer) is PreallocatedLayer for layer in empty_cache(model.config).layers)
    return plain and not any(word in rope for rope in ropes for word in LENGTH_DEPENDENT_ROPES)


def has_state(config: PreTrainedConfig) -> bool:
    """Whether a model keeps recurrent state beside keys and values, which cannot be taken back token by token."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers)


def is_filled(layer: Any) -> bool:
    """Whether a layer of a cache holds keys and values."""
    return getattr(layer, "keys", None) is not None


def read_cache(cache: Cache, last: int = 0) -> KV:
    """Stack the layers of a cache that hold keys and values; prefilled ones are stacked already and not copied.

    Args:
        cache: Any of transformers'; a static one is read up to its end, filled or not.
        last: Number of positions at the end to read; by default all.

    Raises:
        PairError: The model keeps no keys and values, or layers of different shapes.
    """
    layers = [cache.layers[i] for i in _kv_layers(cache)]
    stacked = getattr(cache, "kv", None) or (stacked_layers(layers) if layers else None)
    if stacked is not None:
        return KV(stacked.key[..., -last:, :], stacked.value[..., -last:, :])
    shapes = {(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in layers}
    if len(shapes) != 1:
        got = "none" if not shapes else f"layers of {len(shapes)} shapes, such as {sorted(shapes)[:2]}"
        raise PairError(
            f"expected a model with a KV-cache of one shape in all its attention layers, got {got}; use another model"
        )
    device = layers[0].keys.device
    return KV(
        torch.stack([layer.keys[:, :, -last:].to(device) for layer in layers]),
        torch.stack([layer.values[:, :, -last:].to(device) for layer in layers]),
    )


def write_cache(
    config: PreTrainedConfig, prefilled: Cache, kv: KV, max_cache_len: int | None = None, consume: bool = False
) -> Cache:
    """A cache to decode from: ``kv`` in the layers that hold keys and values, everything else as it was prefilled.

    Args:
        config: The model's own configuration.
        prefilled: The cache that ``kv`` was read from.
        kv: ``(L, B, H, T, D)``.
        max_cache_len: Make it a static cache of this capacity; by default it grows.
        consume: Reuse ``prefilled`` where it holds ``kv`` already; else it is left untouched.
    """
    if consume and max_cache_len is None and _holds(prefilled, kv):
        return prefilled
    if max_cache_len is None:
        cache = DynamicCache(config=config)
    else:
        cache = StaticCache(config=config, max_cache_len=max_cache_len)
    cache.layers += [DynamicLayer() for _ in prefilled.layers[len(cache.layers) :]]
    for i, layer in enumerate(prefilled.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):  # its state changes in place
            cache.layers[i] = copy.deepcopy(layer)
        elif not is_filled(layer):
            cache.layers[i] = layer
    for i, key, value in _by_layer(prefilled, kv):
        layer = cache.layers[i]
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.keys, layer.values = key, value
        else:
            layer.update(key, value)  # a windowed layer keeps what it needs
    return cache


def read_only_cache(prefilled: Cache, kv: KV) -> Cache:
    """A cache with ``kv`` in front of one run, which stores nothing in it: no copy, and the run may be repeated.

    Args:
        prefilled: The cache that ``kv`` was read from; it is left untouched.
        kv: ``(L, B, H, T, D)``.
    """
    stateful = LinearAttentionCacheLayerMixin  # a run changes the state, so it cannot be repeated
    layers = [copy.deepcopy(layer) if isinstance(layer, stateful) else layer for layer in prefilled.layers]
    for i, key, value in _by_layer(prefilled, kv):
        if isinstance(layers[i], stateful):
            layers[i].keys, layers[i].values = key, value
        else:
            layers[i] = _ReadOnlyLayer(key, value)
    return Cache(layers=layers)


def cache_of(kv: KV) -> Cache:
    """A read-only cache of ``kv`` ``(L, B, H, T, D)``, for models with keys and values in all layers, nothing else."""
    cache = Cache(layers=[_ReadOnlyLayer(key, value) for key, value in zip(kv.key, kv.value, strict=True)])
    cache.kv = kv  # read_cache need not stack the layers again
    return cache


def copy_stacked(config: PreTrainedConfig, kv: KV) -> DynamicCache:
    """A copy of ``kv`` ``(L, B, H, T, D)`` as a prefilled cache, all layers at once; for models with prefix reuse."""
    cache = empty_cache(config)
    cache.layers[0].stack.fill(kv.key, kv.value)
    for layer in cache.layers:
        layer.take(kv.key.shape[3])
    return cache


def read_layers(cache: Cache) -> Layers:
    """Keys and values of each layer, each on its own device, without a copy; for models with prefix reuse."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def start_cache(config: PreTrainedConfig, layers: Layers, tokens: int, extra_tokens: int) -> DynamicCache:
    """A new cache with copies of the first tokens of layers that :func:`read_layers` gave, to go on from.

    Args:
        config: The model's own configuration.
        layers: Keys and values.
        tokens: How many tokens of them.
        extra_tokens: How many will be read next.
    """
    cache = empty_cache(config, extra_tokens)
    for index, (key, value) in enumerate(layers):
        cache.update(key[:, :, :tokens], value[:, :, :tokens], index)
    return cache


def overwrite(cache: Cache, kv: KV) -> None:
    """Put ``kv`` ``(L, B, H, T, D)`` in the place of the keys and values that a cache holds."""
    for i, key, value in _by_layer(cache, kv):
        cache.layers[i].keys.copy_(key)
        cache.layers[i].values.copy_(value)


def stage(cache: Cache, kv: KV) -> None:
    """Make a model store and attend to ``kv`` for the tokens it reads next, instead of the keys and values it computes.

    Args:
        cache: The cache that the model will be given with those tokens.
        kv: ``(L, B, H, k, D)``, for ``k`` tokens.
    """
    for i, key, value in zip(_kv_layers(cache), kv.key, kv.value, strict=True):
        layer = cache.layers[i]
        if isinstance(layer, _ReadOnlyLayer):
            layer.staged = key, value
        else:
            _stage_once(layer, key, value)


def keep_rows(cache: Cache, kept: list[int], held: list[int]) -> None:
    """Remove the last tokens of each row, a different number in each, and pad what is left on the left again.

    Args:
        cache: Of a batch padded left; its layers hold keys and values and nothing else.
        kept: How many tokens to keep in each row.
        held: How many there are.
    """
    width, total = max(kept), cache.get_seq_length()
    starts = [total - there - (width - keep) for keep, there in zip(kept, held, strict=True)]
    columns = torch.arange(width) + torch.tensor(starts)[:, None]  # (B, width); those under padding are arbitrary
    index = columns.clamp(min=0)[:, None, :, None]
    for i in _kv_layers(cache):
        layer = cache.layers[i]
        for part in ("keys", "values"):
            tensor = getattr(layer, part)
            expanded = index.to(tensor.device).expand(-1, tensor.shape[1], -1, tensor.shape[3])
            setattr(layer, part, tensor.gather(2, expanded))


class _ReadOnlyLayer(DynamicLayer):
    """Keys and values that a run attends to before its own, or before those staged for it; nothing is stored."""

    staged: tuple[Tensor, Tensor] | None = None

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.keys, self.values = key, value
        self.dtype, self.device, self.is_initialized = key.dtype, key.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = self.staged or (key_states, value_states)
        return (
            torch.cat([self.keys, key.to(key_states)], dim=-2),
            torch.cat([self.values, value.to(value_states)], dim=-2),
        )


def _stage_once(layer: Any, key: Tensor, value: Tensor) -> None:
    """Replace the states of the layer's next update."""
    store = layer.update

    def update(key_states: Tensor, _: Tensor, *args: Any, **kwargs: Any) -> Any:
        del layer.update
        return store(key.to(key_states), value.to(key_states), *args, **kwargs)

    layer.update = update


def _holds(prefilled: Cache, kv: KV) -> bool:
    """Whether a cache holds ``kv`` itself, in layers that keep every position in transformers too."""
    if any(type(layer) is not PreallocatedLayer or layer.windowed for layer in prefilled.layers):
        return False
    stacked = stacked_layers(prefilled.layers)
    return stacked is not None and stacked.key.data_ptr() == kv.key.data_ptr() and stacked.key.shape == kv.key.shape


def _by_layer(cache: Cache, kv: KV) -> list[tuple[int, Tensor, Tensor]]:
    """The number of each layer of a cache that holds keys and values, with those of ``kv`` on its device."""
    devices = [(i, cache.layers[i].keys.device) for i in _kv_layers(cache)]
    layers = zip(devices, kv.key, kv.value, strict=True)
    return [(i, key.to(device), value.to(device)) for (i, device), key, value in layers]


def _kv_layers(cache: Cache) -> list[int]:
    return [i for i, layer in enumerate(cache.layers) if is_filled(layer)]
