"""The loss that trains and measures a fuser: the receiver's, on responses, over the fused cache of their prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvfuse.backends.onednn import onednn_linears
from kvfuse.cache.transformers_cache import cache_arguments, cache_of
from kvfuse.model import CacheToCache
from kvfuse.stages.prefill import ModelCaches
from kvfuse.training.loop.batches import TrainingBatch
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
    options: dict[str, Any] = {} if num_items is None else {"num_items_in_batch": num_items}
    return _respond(pair, batch, fusers, recompute, labels=batch.labels.to(pair.receiver.model.device), **options).loss


def example_losses(pair: CacheToCache, batch: TrainingBatch, fusers: Sequence[nn.Module] | None = None) -> Tensor:
    """Returns the loss of each response, ``(B,)`` float32: nats summed over its tokens; see :func:`response_loss`."""
    logits = _respond(pair, batch, fusers).logits[:, :-1].float()  # (B, R - 1, vocabulary)
    labels = batch.labels[:, 1:].to(logits.device)  # -100 where nothing is learnt, which costs nothing
    return cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)


def _respond(
    pair: CacheToCache,
    batch: TrainingBatch,
    fusers: Sequence[nn.Module] | None,
    recompute: bool = False,
    **options: Any,
) -> CausalLMOutputWithPast:
    """The receiver's output on the responses, over the fused cache of their prompts; ``options`` are its own."""
    receiver, past = pair.receiver.model, batch.prompt.mask[:, :-1]
    mask = torch.cat([past, batch.tail.mask], dim=1)  # (B, T + R)
    options |= cache_arguments(_fused_cache(pair, batch, fusers))
    # Recomputation runs outside of this context and must give the same numbers: no oneDNN then.
    rows = 0 if recompute else batch.tail.ids.numel()
    with recomputed_layers(receiver, recompute), onednn_linears(rows):
        output = receiver(
            input_ids=batch.tail.ids.to(receiver.device),
            attention_mask=mask.to(receiver.device),
            position_ids=batch.tail.positions.to(receiver.device),
            **options,
        )
    return output


def _fused_cache(pair: CacheToCache, batch: TrainingBatch, fusers: Sequence[nn.Module] | None) -> Cache | None:
    """The fused cache of the prompts, read only; where the response is fused too, with its keys and values staged."""
    caches, known = None, batch.prompt_kv
    if known is not None and (fusers is None or fusers):
        receiver = pair.read_receiver(batch.prompt) if known.receiver is None else cache_of(known.receiver)
        caches = ModelCaches(receiver, [cache_of(sharer) for sharer in known.sharers])
    fused = pair.fuse(batch.prompt, caches=caches, fusers=fusers, read_only=True)
    fused.stage(batch.tail, None if known is None else known.tail)
    return fused.cache
