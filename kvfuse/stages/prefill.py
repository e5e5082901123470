"""Read a prompt with a frozen model and keep nothing but its KV-cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvfuse.backends.onednn import onednn_linears
from kvfuse.cache.preallocated import PreallocatedLayer
from kvfuse.cache.transformers_cache import CACHE, KVSpec, empty_cache, is_filled, is_plain, read_cache
from kvfuse.errors import PairError, first_line

Prefill = Callable[..., Cache]
"""Whatever is called as :func:`prefill` is."""
STRETCHING = ("dynamic", "longrope")  # rotary embeddings that turn a token otherwise once a prompt is long


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None = None) -> Cache:
    """Run the model's decoder over a padded batch, up to the last keys and values and no further.

    Neither the vocabulary head nor the attention and feed-forward of the last layer are computed: nobody reads them.

    Args:
        model: Any causal language model.
        ids: ``(B, T)`` int64.
        mask: ``(B, T)``, 1 where there is a token; with a cache of ``P`` positions, ``(B, P + T)``.
        positions: ``(B, T)`` int64, which padding must not shift: the fuser sees keys after RoPE.
        cache: What an earlier run gave, to be read on from; it is filled further.

    Returns:
        A cache of all positions; those under padding hold values that nobody may read.

    Raises:
        PairError: The model keeps no KV-cache.
    """
    cache = empty_cache(model.config) if cache is None else cache
    with suppress(_LastLayerRead), onednn_linears(ids.numel()):
        model.base_model(
            input_ids=ids.to(model.device),
            attention_mask=None if bool(mask.all()) else mask.to(model.device),  # the mask is on the CPU: no sync
            position_ids=positions.to(model.device),
            use_cache=True,
            **{CACHE: _stop_after_last(cache)},
        )
    if not any(is_filled(layer) for layer in cache.layers):
        raise PairError(
            f"expected a causal language model with a KV-cache, got {type(model).__name__}; use another model"
        )
    return cache


def fork(device: torch.device) -> torch.cuda.Stream | None:
    """A GPU's stream for work that may go on beside what is queued from now on (:func:`beside`); None on other devices."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


@contextmanager
def beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Queue what is within on a stream of :func:`fork`; what comes after waits for it.

    Memory that is freed there is taken again by a later fork alone, which waits for all that has read it.
    """
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        yield
    if stream is not None:
        torch.cuda.current_stream(stream.device).wait_stream(stream)


def supports_prefix_reuse(model: PreTrainedModel) -> bool:
    """Whether a model's cache of a prompt begins as its cache of every longer one.

    A recurrent state cannot be taken back to an earlier token, and keys that are turned by the length of the prompt are others in
    a longer one. Such models read all prompts as ever.
    """
    kinds = [str(getattr(module, "rope_type", "")) for module in model.modules()]
    return is_plain(model.config) and not any(word in kind for kind in kinds for word in STRETCHING)


class _LastLayerRead(Exception):
    """Ends a prefill from inside the last layer."""


def _stop_after_last(cache: Cache) -> Cache:
    """Make the update of a cache's last layer end the run; only where that layer holds keys and values and nothing else."""
    last = cache.layers[-1]
    if type(last) in (DynamicLayer, PreallocatedLayer):
        store = last.update

        def update(*args: Any, **kwargs: Any) -> None:
            store(*args, **kwargs)
            del last.update
            raise _LastLayerRead

        last.update = update
    return cache


def probe(model: PreTrainedModel) -> KVSpec:
    """Run two tokens through a model and read the shape of its cache, which configurations do not tell reliably.

    Raises:
        PairError: The model has no KV-cache that can be fused, or does not run with a cache it is given.
    """
    ids = torch.zeros(1, 2, dtype=torch.long)
    try:
        return read_cache(prefill(model, ids, torch.ones_like(ids), torch.arange(2)[None])).spec
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, PairError):
            raise
        raise PairError(
            f"expected a model that fills a cache of transformers, got {type(model).__name__}: {first_line(error)}; use another"
        ) from error
