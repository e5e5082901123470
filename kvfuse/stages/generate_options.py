"""Options of transformers' ``generate`` over a filled cache: what the cache decides, what the user, what the model."""

from numbers import Integral
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfuse.errors import PromptError
from kvfuse.prompts.ends import end_ids

# Fields of GenerationConfig that the filled cache decides; all others are honoured, a user's before the model's own.
# A model's own generation_config is overridden, for it was written for generate alone; a user who asks is refused.
DECIDED_BY_CACHE: dict[str, Any] = {
    "use_cache": True,  # without it, every step would feed all tokens again over the filled cache
    "cache_config": None,  # for kinds of caches that fused keys and values cannot be written into
    "prefill_chunk_size": None,  # the prompt is read already
    "token_healing": False,  # would change the prompt after it was read
    "use_mtp": None,  # needs the prompt's hidden states, which are not kept
    "is_assistant": False,  # rolls the cache of another model's draft back
    # Decoding by code from the Hub, which fills a cache of its own
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "num_beam_groups": None,
    "low_memory": None,
}
ASSISTED_DECODING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
DEFAULT_NEW_TOKENS = 20  # of generate
INPUTS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "cache", "past_key_values")
COUNTS = ("max_new_tokens", "num_beams", "num_return_sequences")


def require_options(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Refuse inputs in place of the prompt and its cache, counts that are not whole and positive, and what a filled
    cache does not allow.

    Args:
        model: The receiver.
        options: A user's, for ``generate``.

    Raises:
        PromptError: Names the option.
    """
    for name in INPUTS:
        if name in options:
            raise PromptError(
                f"expected options for the answer, got {name}, which the prompt and its cache decide; leave it out"
            )
    # 1) Counts, whoever sets them
    wanted, asked = effective(model, options), requested(model, options)
    for name in COUNTS:
        value = wanted.get(name, 1)
        if not (isinstance(value, Integral) and int(value) >= 1):
            raise PromptError(f"expected {name} to be a whole number of at least 1, got {value!r}; correct it")
    # 2) What only the user's own wish can be refused for
    for name, decided in DECIDED_BY_CACHE.items():
        if asked.get(name) not in (None, decided):
            raise PromptError(
                f"expected no {name}, since generate goes on from a cache of the prompt, got {asked[name]!r}; "
                "leave it out"
            )


def resolve(model: PreTrainedModel, options: dict[str, Any]) -> dict[str, Any]:
    """The options for ``generate``, with those that the model's own generation_config must not decide."""
    decided, wanted = dict(DECIDED_BY_CACHE), effective(model, options)
    if not requested(model, options).get("return_dict_in_generate"):  # ids, unless the user wants more
        decided["return_dict_in_generate"] = False
    return options | {name: value for name, value in decided.items() if wanted.get(name) not in (None, value)}


def token_options(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> dict[str, Any]:
    """The options of ``generate`` with the tokens that end an answer and pad a batch, unless they name their own."""
    configs = model.generation_config, options.get("generation_config")
    ends = end_ids(tokenizer, *configs)
    pad_id = next((index for index in (tokenizer.pad_token_id, tokenizer.eos_token_id, *ends) if index is not None), 0)
    return {"eos_token_id": ends or None, "pad_token_id": pad_id, **options}


def static_length(model: PreTrainedModel, prompt_length: int, options: dict[str, Any]) -> int | None:
    """Capacity of the static cache that ``options`` ask for; None for one that grows.

    As in transformers, one less than there will be tokens, for the last is not read, or ``max_cache_len`` if that is
    more. A receiver is compiled again for every length.

    Raises:
        PromptError: They ask for a cache that fused keys and values cannot be written into. Where the model's own
            generation_config asks for one, it grows.
    """
    kind = requested(model, options).get("cache_implementation")
    if kind is None and model.generation_config.cache_implementation == "static":
        kind = "static"
    if kind not in (None, "dynamic", "static"):
        raise PromptError(f"expected cache_implementation to be dynamic or static, got {kind!r}; choose one of the two")
    if kind != "static":
        return None
    wanted = effective(model, options)
    return max(total_length(prompt_length, wanted) - 1, wanted.get("max_cache_len", 0))


def total_length(prompt_length: int, wanted: dict[str, Any]) -> int:
    """The most tokens that prompt and answer may have together, by the options that :func:`effective` gives."""
    if "max_new_tokens" in wanted:
        return prompt_length + int(wanted["max_new_tokens"])
    return int(wanted.get("max_length", prompt_length + DEFAULT_NEW_TOKENS))


def effective(model: PreTrainedModel, options: dict[str, Any]) -> dict[str, Any]:
    """What ``generate`` takes its options to be, those that are set: the user's, else the model's own."""
    # Later layers come before earlier ones
    given = options.get("generation_config")
    layers = vars(model.generation_config), vars(given) if given is not None else {}, options
    return {name: value for layer in layers for name, value in layer.items() if value is not None}


def requested(model: PreTrainedModel, options: dict[str, Any]) -> dict[str, Any]:
    """What the user sets; not what a copy of the model's own generation_config repeats."""
    given, own = options.get("generation_config"), vars(model.generation_config)
    fields = {} if given is None else {name: value for name, value in vars(given).items() if value != own.get(name)}
    return {**fields, **options}
