"""Pairs of random weights in the shapes that figures are given for; what they say means nothing, what they cost is real."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerBase

from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import copy_stacked
from kvfuse.fusers import Fuser, make_fuser
from kvfuse.language_model import LanguageModel
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt, from_ids, stack
from kvfuse.stages.prefill import ModelCaches
from kvfuse.testing import tiny_tokenizer

CONTEXT = {"max_position_embeddings": 8192, "tie_word_embeddings": True}
QWEN3_0_6B = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
QWEN2_5_0_5B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
MID_RECEIVER = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
}
MID_SHARER = {
    "hidden_size": 448,
    "intermediate_size": 1792,
    "num_hidden_layers": 10,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "vocab_size": 32000,
}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "mid": (MID_RECEIVER, MID_SHARER, {"hidden_dim": 512, "intermediate_dim": 512}),
    "true": (QWEN3_0_6B, QWEN2_5_0_5B, {}),
}
"""Receiver, sharer, fuser: ``mid`` has about 50M parameters each, ``true`` is Qwen3-0.6B <- Qwen2.5-0.5B with the paper's fuser."""


def random_pair(
    shapes: str,
    kind: str = "c2c",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    **options: Any,
) -> CacheToCache:
    """A pair of :data:`SHAPES` with open gates; models read the same ids.

    Args:
        shapes: ``mid`` or ``true``.
        kind: Of the fuser; its sizes are those of :data:`SHAPES` where it is the paper's.
        dtype: Of everything.
        device: Of everything.
        options: Of the fuser.
    """
    mine, theirs, sizes = SHAPES[shapes]
    receiver, sharer = _model("qwen3", mine, dtype, device), _model("qwen2", theirs, dtype, device)
    return CacheToCache(
        receiver, [sharer], [random_fuser(receiver, sharer, kind, **{**(sizes if kind == "c2c" else {}), **options})]
    )


def random_fuser(receiver: LanguageModel, sharer: LanguageModel, kind: str, **options: Any) -> Fuser:
    """A fuser with open gates, in the receiver's dtype and beside it; by default models read the same ids."""
    options = {"gate_init": 1.0, "token_alignment": "identity", **options}
    with receiver.model.device:
        fuser = make_fuser(kind, receiver=receiver.identity.to_dict(), sharer=sharer.identity.to_dict(), **options)
    return fuser.to(receiver.model.dtype).eval()


def prompt_for(pair: CacheToCache, batch: int, tokens: int) -> AlignedPrompt:
    """Random ids where models read the same ones, else so many tokens of text, as each model has them."""
    if pair.fusers[0].config.token_alignment == "identity":
        return from_ids(
            torch.randint(5, 300, (batch, tokens), generator=torch.Generator().manual_seed(0)), len(pair.sharers)
        )
    return stack([pair.align(text_of(pair.receiver.tokenizer, tokens))] * batch)


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """English, about so many tokens long."""
    words = "the capital of Norway and a language that people speak there " * (
        tokens // 11 + 1
    )  # 11 words are at least 11 tokens
    return tokenizer.decode(tokenizer(words).input_ids[:tokens])


def random_streams(pair: CacheToCache, prompt: AlignedPrompt) -> ModelCaches:
    """What :meth:`CacheToCache.read` would give, but nobody has read: random caches of the right shapes, at once."""
    batch, tokens = prompt.ids.shape
    sharers = [
        _random_cache(sharer, batch, reads.ids.shape[1])
        for sharer, reads in zip(pair.sharers, prompt.sharers, strict=True)
    ]
    return ModelCaches(_random_cache(pair.receiver, batch, tokens - 1), sharers)


def _random_cache(model: LanguageModel, batch: int, tokens: int) -> DynamicCache:
    spec, like = model.kv_spec, {"dtype": model.model.dtype, "device": model.model.device}
    parts = (
        torch.randn(spec.num_layers, batch, spec.num_kv_heads, tokens, dim, **like)
        for dim in (spec.key_dim, spec.value_dim)
    )
    return copy_stacked(model.model.config, KV(*parts))


def _model(family: str, sizes: dict[str, Any], dtype: torch.dtype, device: str | torch.device) -> LanguageModel:
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(family, **sizes, **CONTEXT, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return LanguageModel(model, tokenizer)
