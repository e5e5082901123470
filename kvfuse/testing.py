"""Tiny models and tokenizers that disagree, built in-process: for tests, docs and plugins. No network, milliseconds."""

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
SMALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 12},
    "qwen2": {},
    "llama": {"rope_parameters": {**LLAMA_3_ROPE, "original_max_position_embeddings": 32}},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": WINDOWED},
    "mistral": {"head_dim": 8, "sliding_window": 8},
    "phi3": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo2": {},
    "gpt_oss": {
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": WINDOWED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "qwen3_moe": {"head_dim": 8, **SMALL_EXPERTS},
    "gpt2": {},
    "gpt_neox": {},
    "qwen3_next": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "shared_expert_intermediate_size": 16,
        **SMALL_EXPERTS,
        **LINEAR,
    },
    "falcon_h1": {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
}
"""transformers' ``model_type`` -> what makes it tiny: RoPE scaled and absent, short windows, experts, no GQA, linear attention."""


def tiny_tokenizer(vocab_size: int = 320, template: str | None = "tagged") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; another ``vocab_size`` splits words elsewhere.

    Args:
        vocab_size: At least 261: bytes and special tokens.
        template: A key of :data:`TEMPLATES`, or None for a model without a chat template.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
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
    """A random model of a family of transformers, 3 layers by default, with its tokenizer.

    Args:
        family: A key of :data:`FAMILIES`, transformers' ``model_type``.
        tokenizer: By default a new one.
        seed: Of the weights.
        options: Fields of the family's configuration.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    settings = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        **sizes,
        **special,
        **FAMILIES[family],
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**settings, **options}))
    return LanguageModel(model.eval().requires_grad_(False), tokenizer)


def tiny_fuser(
    receiver: LanguageModel, sharer: LanguageModel, kind: str = "c2c", seed: int = 0, **options: Any
) -> Fuser:
    """A random fuser for a pair, gates open, small enough for tests."""
    torch.manual_seed(seed)
    same = receiver.identity.tokenizer == sharer.identity.tokenizer
    sizes = {name: 16 for name in fuser_class(kind).config_class.__annotations__ if name.endswith("_dim")}
    defaults = {**sizes, "gate_init": 1.0, "token_alignment": default_token_alignment(same)}
    pair = {"receiver": receiver.identity.to_dict(), "sharer": sharer.identity.to_dict()}
    return make_fuser(kind, **pair, **{**defaults, **options}).eval()
