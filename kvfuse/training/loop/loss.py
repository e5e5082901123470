"""The loss that trains a fuser, and measures one: the receiver's, on responses, over the fused cache of their prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from kvfuse.backends.onednn import onednn_linears
from kvfuse.cache.transformers_cache import CACHE, cache_of, read_cache, read_only_cache, stage
from kvfuse.model import CacheToCache
from kvfuse.training.loop.batches import Kept, TrainingBatch
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
        fusers: In place of the pair's own, e.g. wrapped; an empty list gives the receiver's own loss.
        num_items: Divide the summed loss by this many tokens; by default by those of the batch.
        recompute: Keep the input of each receiver layer alone for the backward pass; what is inside is computed again there.

    Returns:
        0-d float32 in nats.
    """
    receiver, past = pair.receiver.model, batch.prompt.mask[:, :-1]
    mask = torch.cat([past, batch.tail.mask], dim=1)
    options: dict[str, Any] = {} if num_items is None else {"num_items_in_batch": num_items}
    options[CACHE] = _fused_cache(pair, batch, pair.fusers if fusers is None else fusers)
    rows = (
        0 if recompute else batch.tail.ids.numel()
    )  # what is computed again, outside of this, must come out as it was
    with recomputed_layers(receiver, recompute), onednn_linears(rows):
        output = receiver(
            input_ids=batch.tail.ids.to(receiver.device),
            attention_mask=mask.to(receiver.device),
            position_ids=batch.tail.positions.to(receiver.device),
            use_cache=False,  # the one it is given is read, and not filled
            labels=batch.labels.to(receiver.device),
            **options,
        )
    return output.loss


def _fused_cache(pair: CacheToCache, batch: TrainingBatch, fusers: Sequence[nn.Module]) -> Cache | None:
    """The cache of the prompts, and where the response is fused too, the keys and values that its tokens will have."""
    if batch.prompt.ids.shape[1] < 2:
        return None
    if batch.kept is not None and fusers:
        return _fuse_kept(pair, batch, batch.kept, fusers)
    streams = pair.read(batch.prompt, len(fusers))
    fused = pair.fuse_kv(batch.prompt, read_cache(streams.receiver), list(map(read_cache, streams.sharers)), fusers)
    cache = read_only_cache(streams.receiver, fused)
    if pair.fuse_response and fusers:
        stage(cache, pair.prefill_response(streams, batch.prompt, batch.tail, fusers))
    return cache


def _fuse_kept(pair: CacheToCache, batch: TrainingBatch, kept: Kept, fusers: Sequence[nn.Module]) -> Cache:
    """Where the sharers need not read any more, nor perhaps the receiver."""
    receiver = pair.read_receiver(batch.prompt) if kept.receiver is None else cache_of(kept.receiver)
    return read_only_cache(
        receiver, pair.fuse_kv(batch.prompt, kept.receiver or read_cache(receiver), kept.sharers, fusers)
    )
