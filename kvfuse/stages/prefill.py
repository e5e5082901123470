"""Prefill: a frozen model reads a prompt, and nothing but its KV-cache is kept."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvfuse.backends.offloading import input_device
from kvfuse.backends.onednn import onednn_linears
from kvfuse.cache.kv import KVSpec
from kvfuse.cache.preallocated import LastLayerRead, PreallocatedLayer
from kvfuse.cache.transformers_cache import cache_arguments, empty_cache, is_filled, read_cache, write_cache
from kvfuse.errors import PairError, first_line

TOLERANCE, HALF_TOLERANCE = 5e-3, 2.5e-2  # share of the largest logit; rounding stays below, a lost state does not
Prefill = Callable[..., Cache]
"""Anything that is called as :func:`prefill` is."""


@dataclass
class ModelCaches:
    """What every model has read, each in its own cache; nothing in them is fused.

    Attributes:
        receiver: All prompt positions but the last.
        sharers: All positions of their prompts.
    """

    receiver: Cache
    sharers: list[Cache]


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None = None) -> Cache:
    """Run a model's decoder over a padded batch, up to the last keys and values and no further.

    The vocabulary head, and the attention and feed-forward of the last layer, are not computed: a cache does not need
    them.

    Args:
        model: Any causal language model.
        ids: ``(B, T)`` int64.
        mask: ``(B, T)``, 1 where there is a token; with a cache of ``P`` positions, ``(B, P + T)``.
        positions: ``(B, T)`` int64. Padding must not shift them, since a fuser sees keys after RoPE.
        cache: The result of an earlier run, which is extended.

    Returns:
        A cache of all positions; those under padding are arbitrary.

    Raises:
        PairError: The model keeps no KV-cache.
    """
    cache = empty_cache(model.config) if cache is None else cache
    if isinstance(cache.layers[-1], PreallocatedLayer):  # else the layer holds more than keys and values
        cache.layers[-1].ends_run = True
    device = input_device(model)
    with suppress(LastLayerRead), onednn_linears(ids.numel()):
        model.base_model(
            input_ids=ids.to(device),
            attention_mask=None if bool(mask.all()) else mask.to(device),  # on the CPU, so no device waits
            position_ids=positions.to(device),
            **cache_arguments(cache),
        )
    if not any(is_filled(layer) for layer in cache.layers):
        raise PairError(
            f"expected a causal language model with a KV-cache, got {type(model).__name__}; use another model"
        )
    return cache


@torch.no_grad()
def continues_exactly(model: PreTrainedModel) -> bool:
    """Whether a model computes several tokens after a filled cache as it computes them one by one.

    Scoring, training and fused responses feed a response at once. The mixers of some hybrids (Jamba, RecurrentGemma)
    forget their state there, without an error.
    """
    # 1) Four prompts of ordinary tokens: a state that is lost shows in all, an expert that rounding switches in few.
    rows, read, fed = 4, 3, 2
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(rows * (read + fed)).reshape(rows, -1) + vocabulary // 2) % vocabulary
    mask, positions = torch.ones_like(ids), torch.arange(read + fed).expand(rows, -1)

    def run(chunk: int) -> Tensor:
        prefilled = prefill(model, ids[:, :read], mask[:, :read], positions[:, :read])
        cache = write_cache(model.config, prefilled, read_cache(prefilled))
        logits = []
        for start in range(read, read + fed, chunk):
            part, end = slice(start, start + chunk), start + chunk
            inputs = {"input_ids": ids[:, part], "attention_mask": mask[:, :end], "position_ids": positions[:, part]}
            inputs = {name: tensor.to(input_device(model)) for name, tensor in inputs.items()}
            logits.append(model(**inputs, **cache_arguments(cache)).logits.float())
        return torch.cat(logits, dim=1)  # (rows, fed, vocabulary)

    # 2) The largest difference of each prompt, as a share of its largest logit.
    at_once, one_by_one = run(fed), run(1)
    difference, largest = ((at_once - one_by_one).abs().amax((1, 2)), one_by_one.abs().amax((1, 2)))  # (rows,) each
    tolerance = TOLERANCE if model.dtype == torch.float32 else HALF_TOLERANCE
    return bool((difference <= tolerance * largest).any())


def probe(model: PreTrainedModel) -> KVSpec:
    """Run two tokens through a model and read the shape of its cache, which configurations do not tell reliably.

    Raises:
        PairError: The model has no KV-cache that can be fused, or does not run with a cache that it is given.
    """
    ids = torch.zeros(1, 2, dtype=torch.long)
    try:
        return read_cache(prefill(model, ids, torch.ones_like(ids), torch.arange(2)[None])).spec
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, PairError):
            raise
        raise PairError(
            f"expected a model that fills a cache of transformers, got {type(model).__name__}: {first_line(error)}; "
            "use another"
        ) from error
