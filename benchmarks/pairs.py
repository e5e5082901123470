"""Pairs of random weights in the shapes that figures are given for: their answers are noise, their costs are real."""

from typing import Annotated, Any

import torch
import typer
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
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
# columns as in SIZES
QWEN3_0_6B = dict(zip(SIZES, (1024, 3072, 28, 16, 8, 128, 151936), strict=True))
QWEN2_5_0_5B = dict(zip(SIZES, (896, 4864, 24, 14, 2, 64, 151936), strict=True))
MID_RECEIVER = dict(zip(SIZES, (512, 1536, 12, 8, 4, 64, 32000), strict=True))
MID_SHARER = dict(zip(SIZES, (448, 1792, 10, 7, 1, 64, 32000), strict=True))
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "mid": (MID_RECEIVER, MID_SHARER, {"hidden_dim": 512, "intermediate_dim": 512}),
    "true": (QWEN3_0_6B, QWEN2_5_0_5B, {}),
}
"""Receiver, sharer, fuser: ``mid`` has about 50M parameters each, ``true`` is Qwen3-0.6B <- Qwen2.5-0.5B."""
Shapes = Annotated[str, typer.Option(help="mid (about 50M parameters each) or true (Qwen3-0.6B <- Qwen2.5-0.5B).")]
"""Type of the option that names them."""


def random_pair(
    shapes: str,
    kind: str = "c2c",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    **options: Any,
) -> CacheToCache:
    """Returns a pair of :data:`SHAPES` with open gates; both models read the same ids.

    Args:
        shapes: ``mid`` or ``true``.
        kind: Of the fuser; the paper's has the sizes of :data:`SHAPES`.
        dtype: Of models and fuser.
        device: Of models and fuser.
        options: Of the fuser.
    """
    receiver_sizes, sharer_sizes, fuser_sizes = SHAPES[shapes]
    receiver = _model("qwen3", receiver_sizes, dtype, device)
    sharer = _model("qwen2", sharer_sizes, dtype, device)
    options = {**(fuser_sizes if kind == "c2c" else {}), **options}
    return CacheToCache(receiver, [sharer], [random_fuser(kind, receiver=receiver, sharer=sharer, **options)])


def random_fuser(kind: str, *, receiver: LanguageModel, sharer: LanguageModel, **options: Any) -> Fuser:
    """Returns a fuser with open gates, in the receiver's dtype and on its device; by default models read equal ids."""
    options = {"gate_init": 1.0, "token_alignment": "identity", **options}
    with receiver.model.device:
        fuser = make_fuser(kind, receiver=receiver.identity.to_dict(), sharer=sharer.identity.to_dict(), **options)
    return fuser.to(receiver.model.dtype).eval()


def prompt_for(pair: CacheToCache, batch: int, tokens: int) -> AlignedPrompt:
    """Returns random ids where the models read the same ones, else English text of about as many tokens."""
    if pair.fusers[0].config.token_alignment == "identity":
        ids = torch.randint(5, 300, (batch, tokens), generator=torch.Generator().manual_seed(0))
        return from_ids(ids, len(pair.sharers))
    return stack([pair.align(text_of(pair.receiver.tokenizer, tokens))] * batch)


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """Returns about ``tokens`` tokens of English."""
    sentence = "the capital of Norway and a language that people speak there "  # 11 words: at least 11 tokens
    return tokenizer.decode(tokenizer(sentence * (tokens // 11 + 1)).input_ids[:tokens])


def random_caches(pair: CacheToCache, prompt: AlignedPrompt) -> ModelCaches:
    """Returns random caches of the shapes that :meth:`CacheToCache.read` returns, at once."""
    batch, tokens = prompt.ids.shape
    # sharers read the last prompt token too, the receiver does not
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
