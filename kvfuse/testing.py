"""Tiny random models, tokenizers and fusers, built in milliseconds without network: for tests, docs and plugins."""

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kvfuse.fusers import Fuser, fuser_class, make_fuser
from kvfuse.language_model import LanguageModel
from kvfuse.prompts.alignment import default_token_alignment

CORPUS = (
    "What is the capital of Norway? The capital of Norway is Oslo.",
    "Which language do people speak in Rotterdam? They speak Dutch there, and English too.",
    "Two models read the same question; one of them answers. def fuse(receiver, sharer): return receiver + sharer",
    "user assistant system question answer 0 1 2 3 4 5 6 7 8 9",
)
TEMPLATES = {
    "tagged": "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "lines": "{% for message in messages %}[{{ message.role }}]\n{{ message.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}",
}
SPECIAL = ("<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
PARTLY_LINEAR = ["linear_attention", "full_attention", "full_attention"]
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED_EXPERT = {"shared_expert_intermediate_size": 16}
GPT_OSS_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LLAMA_3_ROPE = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **SCALING}}
DEFAULT_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 12},  # heads together wider than the hidden size
    "qwen2": {},
    "llama": LLAMA_3_ROPE,  # scaled rotary embedding
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": WINDOWED},
    "mistral": {"head_dim": 8, "sliding_window": 8},  # a window in every layer
    "phi3": {},
    "smollm3": {"no_rope_layer_interval": 2},  # one layer without rotary embedding
    "olmo2": {},
    "gpt_oss": {"head_dim": 8, "sliding_window": 8, "layer_types": WINDOWED, **GPT_OSS_EXPERTS, **DEFAULT_ROPE},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
    "gpt2": {},  # learned positions, no grouped queries
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "expansion_ratio": 2},  # ALiBi; its configuration uses no cache
    "gpt_neox": {},  # rotary embedding of a part of each head
    "qwen3_next": {"layer_types": PARTLY_LINEAR, "head_dim": 8, **SHARED_EXPERT, **EXPERTS, **LINEAR},
    "falcon_h1": {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
}
"""``model_type`` -> options. Together they cover scaled and missing RoPE, windows, experts and linear attention."""
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def tiny_tokenizer(vocab_size: int = 320, template: str | None = "tagged") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer. Different vocabulary sizes split words differently.

    Args:
        vocab_size: At least 261, for the bytes and special tokens.
        template: A key of :data:`TEMPLATES`, or None for a tokenizer without a chat template.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        chat_template=TEMPLATES.get(template or ""),
        padding_side="left",
    )


def tiny_model(
    family: str = "qwen3", tokenizer: PreTrainedTokenizerFast | None = None, seed: int = 0, **options: Any
) -> LanguageModel:
    """A random model with its tokenizer, by default with 3 layers.

    Args:
        family: A key of :data:`FAMILIES`, transformers' ``model_type``.
        tokenizer: Default: a new one.
        seed: Seed of the weights.
        options: Fields of the family's configuration.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    vocabulary = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    settings = {"initializer_range": 0.2, **SIZES, **vocabulary, **FAMILIES[family], **options}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    return LanguageModel(model.eval().requires_grad_(False), tokenizer)


def tiny_fuser(
    receiver: LanguageModel, sharer: LanguageModel, kind: str = "c2c", seed: int = 0, **options: Any
) -> Fuser:
    """A random fuser for a pair, with open gates.

    Args:
        receiver: The model that answers.
        sharer: The model that only reads.
        kind: A kind of fuser (:func:`kvfuse.fusers.make_fuser`).
        seed: Seed of the weights.
        options: Fields of its configuration.
    """
    torch.manual_seed(seed)
    same = receiver.identity.tokenizer == sharer.identity.tokenizer
    sizes = {name: 16 for name in fuser_class(kind).config_class.__annotations__ if name.endswith("_dim")}
    defaults = {**sizes, "gate_init": 1.0, "token_alignment": default_token_alignment(same)}
    pair = {"receiver": receiver.identity.to_dict(), "sharer": sharer.identity.to_dict()}
    return make_fuser(kind, **pair, **{**defaults, **options}).eval()
