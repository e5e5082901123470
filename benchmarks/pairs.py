"""Pairs of random weights in the shapes that figures are given for; what they say means nothing, what they cost is real."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvfuse.fusers import make_fuser
from kvfuse.language_model import LanguageModel
from kvfuse.model import CacheToCache
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


def random_pair(shapes: str, kind: str = "c2c", dtype: torch.dtype = torch.float32, **options: Any) -> CacheToCache:
    """A pair of :data:`SHAPES` with open gates; models read the same ids.

    Args:
        shapes: ``mid`` or ``true``.
        kind: Of the fuser; its sizes are those of :data:`SHAPES` where it is the paper's.
        dtype: Of everything.
        options: Of the fuser.
    """
    mine, theirs, sizes = SHAPES[shapes]
    receiver, sharer = _model("qwen3", mine, dtype), _model("qwen2", theirs, dtype)
    options = {**(sizes if kind == "c2c" else {}), "gate_init": 1.0, "token_alignment": "identity", **options}
    fuser = make_fuser(kind, receiver=receiver.identity.to_dict(), sharer=sharer.identity.to_dict(), **options)
    return CacheToCache(receiver, [sharer], [fuser.to(dtype).eval()])


def _model(family: str, sizes: dict[str, Any], dtype: torch.dtype) -> LanguageModel:
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(family, **sizes, **CONTEXT, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return LanguageModel(model, tokenizer)
