"""The loss that trains and measures a fuser: the receiver's, on responses, over the fused cache of their prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from kvfuse.backends.onednn import onednn_linears
from kvfuse.cache.transformers_cache import CACHE, cache_of, read_cache, read_only_cache, stage
from kvfuse.model import CacheToCache
from kvfuse.training.loop.batches import PromptKV, TrainingBatch
from kvfuse.training.memory.recompute import recomputed_layers


def response_loss(
    pair: CacheToCache,
    batch: TrainingBatch,
    fusers: Sequence[nn.Module] | None = None,
    num_items: Tensor | int | None = None,
    recompute: bool = False,
) -> Tensor:
    """Next-token loss of the receiver on the responses, over the fused cache of the prompts (paper, 3.3.4).

    Args:
        pair: The models; gradients flow through the frozen receiver into the fusers.
        batch: Prompts, responses, labels.
        fusers: Used instead of the pair's, e.g. wrapped ones; an empty list gives the receiver's own loss.
        num_items: Number of tokens to divide the summed loss by; default: those of the batch.
        recompute: Keep only the input of each receiver layer for the backward pass, and recompute the rest there.

    Returns:
        0-d float32 in nats.
    """
    receiver, past = pair.receiver.model, batch.prompt.mask[:, :-1]
    mask = torch.cat([past, batch.tail.mask], dim=1)  # (B, T + R)
    options: dict[str, Any] = {} if num_items is None else {"num_items_in_batch": num_items}
    options[CACHE] = _fused_cache(pair, batch, pair.fusers if fusers is None else fusers)
    # Recomputation runs outside of this context and must give the same numbers: no oneDNN then
    rows = 0 if recompute else batch.tail.ids.numel()
    with recomputed_layers(receiver, recompute), onednn_linears(rows):
        output = receiver(
            input_ids=batch.tail.ids.to(receiver.device),
            attention_mask=mask.to(receiver.device),
            position_ids=batch.tail.positions.to(receiver.device),
            use_cache=False,  # read the given cache, do not fill it
            labels=batch.labels.to(receiver.device),
            **options,
        )
    return output.loss


def _fused_cache(pair: CacheToCache, batch: TrainingBatch, fusers: Sequence[nn.Module]) -> Cache | None:
    """The fused cache of the prompts and, where the response is fused too, the keys and values of its tokens."""
    if batch.prompt.ids.shape[1] < 2:
        return None
    if batch.prompt_kv is not None and fusers:
        return _fuse_precomputed(pair, batch, batch.prompt_kv, fusers)
    streams = pair.read(batch.prompt, len(fusers))
    fused = pair.fuse_kv(batch.prompt, read_cache(streams.receiver), list(map(read_cache, streams.sharers)), fusers)
    cache = read_only_cache(streams.receiver, fused)
    if pair.fuse_response and fusers:
        stage(cache, pair.prefill_response(streams, batch.prompt, batch.tail, fusers))
    return cache


def _fuse_precomputed(pair: CacheToCache, batch: TrainingBatch, known: PromptKV, fusers: Sequence[nn.Module]) -> Cache:
    """The same without prefilling the sharers, nor the receiver where its cache is precomputed too."""
    receiver = pair.read_receiver(batch.prompt) if known.receiver is None else cache_of(known.receiver)
    return read_only_cache(
        receiver, pair.fuse_kv(batch.prompt, known.receiver or read_cache(receiver), known.sharers, fusers)
    )
