"""Decode: the receiver goes on from a fused cache, with transformers' own ``generate`` or along given responses."""

import copy
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from kvfuse.cache.transformers_cache import CACHE
from kvfuse.errors import PromptError
from kvfuse.prompts.alignment import AlignedPrompt
from kvfuse.prompts.ends import end_ids
from kvfuse.stages.phases import generation
from kvfuse.stages.response_fusion import ResponseFuser

ASSISTED_DECODING = ("assistant_model", "prompt_lookup_num_tokens")
INPUTS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "cache", "past_key_values")


def decode(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    cache: Cache | None,
    *,
    response_fuser: ResponseFuser | None = None,
    phase: str = "first_token",
    **options: Any,
) -> Any:
    """Generate after a prompt whose first ``T - 1`` positions are in a cache; the last token is the first query.

    Args:
        model: The receiver.
        ids: ``(B, T)`` int64, padded left.
        mask: ``(B, T)``.
        cache: Of exactly ``T - 1`` positions, which is consumed; None for a prompt of one token, where nothing is
            fused.
        response_fuser: Fuses the last prompt token and the generated ones, too.
        phase: The phase that the time to the first token is counted to (:mod:`kvfuse.stages.phases`).
        options: Any of ``generate``: sampling, beams, streamer, stopping criteria, logits processors, assistant, …

    Returns:
        What ``generate`` returns: ``(B, T + new)`` ids, or its output object.

    Raises:
        PromptError: Assisted decoding is asked for where the response is fused too, or a count is below one.
    """
    require_counts(model, options)
    ids, mask = ids.to(model.device), mask.to(model.device)
    wanted = _options(model, options, "num_beams", "num_return_sequences", *ASSISTED_DECODING)
    is_assisted = any(wanted[name] for name in ASSISTED_DECODING)
    if response_fuser is not None and is_assisted:
        raise PromptError(
            f"expected none of {', '.join(ASSISTED_DECODING)} where the response is fused too, got one; leave it out"
        )
    if cache is not None:
        # 1) generate repeats the ids for beams and samples, but not a cache it is given.
        if response_fuser is not None:
            _reorder_together(cache, response_fuser)
        copies = max(wanted["num_beams"] or 1, wanted["num_return_sequences"] or 1)
        if copies > 1:
            cache.reorder_cache(torch.arange(len(ids), device=ids.device).repeat_interleave(copies))
        # 2) The cache is of the kind and length that were asked for already.
        options.pop("max_cache_len", None)
        options |= {"cache_implementation": None, CACHE: cache}
        if response_fuser is not None or is_assisted:
            model = _fed_only_new_tokens(model, response_fuser)
    else:
        options.setdefault("cache_implementation", None)  # as for longer prompts, not the publisher's recommendation
    with generation(phase, options) as options:
        return model.generate(ids, attention_mask=mask, **options)


class _Cancelled(Exception):
    """Ends a run from within its streamer."""


class _CancellableStreamer(TextIteratorStreamer):
    """A streamer that ends the run which fills it, at its next token, once one of the events is set."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, events: Sequence[Event]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.events = events

    def put(self, value: Tensor) -> None:
        """Called by ``generate`` with the prompt, then with each token."""
        if any(event.is_set() for event in self.events):
            raise _Cancelled
        super().put(value)


def stream(
    tokenizer: PreTrainedTokenizerBase, run: Callable[[TextIteratorStreamer], Any], cancel: Event | None = None
) -> Iterator[str]:
    """The generated text of a run, piece by piece, while the run goes on in a thread of its own.

    The run ends within one token when the iterator is closed, as it is when a loop over it is left, or when ``cancel``
    is set.

    Args:
        tokenizer: The generating model's.
        run: Calls ``generate`` with the streamer that it is given. What it raises is raised here.
        cancel: Set by another thread to end the text where it is.
    """
    left = Event()
    streamer = _CancellableStreamer(tokenizer, [left] if cancel is None else [left, cancel])
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():  # a switch of each thread
                run(streamer)
        except _Cancelled:
            streamer.end()  # gives the text so far
        except BaseException as error:  # raised in the caller's thread
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:  # also where the caller leaves early
        left.set()
        thread.join()
    if failure:
        raise failure[0]


@torch.no_grad()
def score(
    model: PreTrainedModel, prompt: AlignedPrompt, tail: AlignedPrompt, cache: Cache | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given responses after their prompts, in one run over the responses.

    Args:
        model: The receiver.
        prompt: A batch, padded left.
        tail: The last prompt token and the response of each row (:func:`kvfuse.prompts.response.stack_responses`).
        cache: All prompt positions but the last, which is consumed; None for prompts of one token.

    Returns:
        Summed log-probabilities of the response's tokens ``(B,)`` float32, in nats; and ``(B,)`` bool, whether each of
        them is the most likely at its position.
    """
    mask = torch.cat([prompt.mask[:, :-1], tail.mask], dim=1).to(model.device)
    ids, positions = tail.ids.to(model.device), tail.positions.to(model.device)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE: cache}).logits[:, :-1]
    # The vocabulary is large: padding is left out before the softmax.
    is_token = tail.mask[:, 1:].bool().to(logits.device)  # (B, R)
    targets, logits = ids[:, 1:][is_token], logits[is_token].float()  # (n,), (n, vocabulary)
    log_probs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]  # (n,)
    by_row = torch.zeros(is_token.shape, device=is_token.device).masked_scatter(is_token, log_probs)
    greedy = torch.ones_like(is_token).masked_scatter(is_token, logits.argmax(-1) == targets)
    return by_row.sum(1), greedy.all(1)


def require_counts(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Refuse inputs in place of the prompt and its fused cache, and counts that are not whole and positive.

    Raises:
        PromptError: Names the option.
    """
    for name in INPUTS:
        if name in options:
            raise PromptError(
                f"expected options for the answer, got {name}, which the prompt and its cache decide; leave it out"
            )
    for name, value in _options(model, options, "max_new_tokens", "num_beams", "num_return_sequences").items():
        if value is not None and not (isinstance(value, Integral) and int(value) >= 1):
            raise PromptError(f"expected {name} to be a whole number of at least 1, got {value!r}; correct it")


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
    wanted = _options(model, options, "cache_implementation", "max_new_tokens", "max_length", "max_cache_len")
    kind = wanted["cache_implementation"]
    # A kind that the model's publisher recommends is no request of the user
    if "cache_implementation" not in options and kind == model.generation_config.cache_implementation != "static":
        kind = None
    if kind not in (None, "dynamic", "static"):
        raise PromptError(f"expected cache_implementation to be dynamic or static, got {kind!r}; choose one of the two")
    if kind != "static":
        return None
    new = wanted["max_new_tokens"]
    total = prompt_length + new if new is not None else wanted["max_length"] or model.generation_config.max_length
    return max(total - 1, wanted["max_cache_len"] or 0)


def _options(model: PreTrainedModel, options: dict[str, Any], *names: str) -> dict[str, Any]:
    """What ``generate`` would take each option to be."""
    config = options.get("generation_config") or model.generation_config
    return {name: options.get(name, getattr(config, name, None)) for name in names}


def _reorder_together(cache: Cache, response_fuser: ResponseFuser) -> None:
    """When ``generate`` reorders the cache it was given, for beams, the response fuser's caches follow."""
    reorder = cache.reorder_cache

    def reorder_all(rows: Tensor) -> None:
        reorder(rows)
        response_fuser.reorder(rows)

    cache.reorder_cache = reorder_all


def _fed_only_new_tokens(model: PreTrainedModel, response_fuser: ResponseFuser | None) -> PreTrainedModel:
    """A shallow copy that is never fed a token its cache holds already; its new tokens are fused, if they are to be.

    Assisted decoding feeds the whole prompt in its first step even if the cache is filled, and answers wrongly without
    an error. The model itself is not touched, since other threads generate with it.
    """
    prepare = model.prepare_inputs_for_generation

    # generate reads the names of these arguments, so the mask stands there in full.
    def prepare_new(input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        known = 0 if cache is None else cache.get_seq_length()
        if kwargs.get("next_sequence_length") is None and input_ids.shape[1] > known:
            kwargs["next_sequence_length"] = input_ids.shape[1] - known
        if response_fuser is not None:
            seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            response_fuser.feed(cache, input_ids[:, known:], seen)
        return prepare(input_ids, attention_mask=attention_mask, **kwargs)

    twin = copy.copy(model)
    twin.prepare_inputs_for_generation = prepare_new
    return twin
