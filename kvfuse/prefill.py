"""Read a prompt with a frozen model and keep nothing but its KV-cache."""

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvfuse.errors import PairError
from kvfuse.kv_cache import KVSpec, empty_cache, read_cache


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Cache:
    """Run the model's decoder, without its vocabulary head, over a left-padded batch.

    Args:
        ids: ``(B, T)`` int64.
        mask: ``(B, T)``, 1 where there is a token.

    Returns:
        A cache of all ``T`` positions; those under padding hold values that nobody may read.

    Raises:
        PairError: The model returns no cache.
    """
    output = model.base_model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=positions(mask).to(model.device),
        past_key_values=empty_cache(model.config),
        use_cache=True,
    )
    if getattr(output, "past_key_values", None) is None:
        raise PairError(f"expected a causal language model with a KV-cache, got {type(model).__name__}; use another model")
    return output.past_key_values


def positions(mask: Tensor) -> Tensor:
    """``(B, T)`` position of each token in its own row, so that padding does not shift RoPE: the fuser sees keys after RoPE."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def probe(model: PreTrainedModel) -> KVSpec:
    """Run two tokens through a model and read the shape of its cache, which configurations do not tell reliably.

    Raises:
        PairError: The model has no KV-cache that can be fused.
    """
    ids = torch.zeros(1, 2, dtype=torch.long)
    return read_cache(prefill(model, ids, torch.ones_like(ids))).spec
