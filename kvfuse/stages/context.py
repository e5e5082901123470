"""Lengths that a model's configuration sets: its context, and where its rotary embedding changes for all positions."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from kvfuse.errors import PromptError

SCALED_BY_FACTOR = ("linear", "dynamic")  # max_position_embeddings stays that of pretraining, as transformers documents


def context_length(config: PreTrainedConfig) -> int | None:
    """The longest prompt a model was made for, in tokens; None if its configuration does not say.

    Scaled rotary embeddings count as in ``transformers.modeling_rope_utils``: YaRN multiplies the original length by
    its factor unless ``max_position_embeddings`` is the longer one already.
    """
    config = config.get_text_config()
    # 1) Families with other names for it
    names = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions")
    given: int | None = next((value for name in names if (value := getattr(config, name, None))), None)
    rope = _rope(config)
    factor = rope.get("factor") or 1
    if given is None:
        return None
    # 2) A rotary embedding that reaches further
    if rope.get("rope_type") in SCALED_BY_FACTOR:
        return round(given * factor)
    if rope.get("rope_type") == "yarn":
        return max(given, round((rope.get("original_max_position_embeddings") or given) * factor))
    return given


def rope_switch(config: PreTrainedConfig) -> int | None:
    """The length beyond which LongRoPE rotates all positions otherwise (arXiv 2402.13753); None for other models."""
    config = config.get_text_config()
    rope = _rope(config)
    if rope.get("rope_type") != "longrope":
        return None
    length = getattr(config, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    return int(length) if length else None


def crosses(switch: int | None, *, read: int, total: int) -> bool:
    """Whether a model with ``read`` positions in its cache would rotate them otherwise before it has ``total``."""
    return switch is not None and read <= switch < total


def require_one_rope(model: PreTrainedModel, *, read: int, total: int) -> None:
    """Refuse to go on from a cache across the length at which all of its keys would be rotated otherwise.

    Transformers drops the cache there, and what was fused with it.

    Args:
        model: The receiver.
        read: Number of positions in its cache.
        total: Number of positions that there will be at most.

    Raises:
        PromptError: Names the length.
    """
    switch = rope_switch(model.config)
    if switch is not None and crosses(switch, read=read, total=total):
        raise PromptError(
            f"expected a prompt and an answer of at most {switch + 1} tokens together, since {type(model).__name__} "
            f"rotates all keys otherwise beyond, got {read + 1} and up to {total - read}; ask for fewer new tokens"
        )


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """A model's RoPE parameters; none where it has several, one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {} if any(isinstance(value, dict) for value in rope.values()) else rope
