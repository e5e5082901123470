"""The receiver goes on from a fused cache: with transformers' own ``generate``, or along given responses."""

import copy
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from kvfuse.cache.transformers_cache import CACHE
from kvfuse.errors import PromptError
from kvfuse.prompts.alignment import AlignedPrompt
from kvfuse.stages.phases import generation
from kvfuse.stages.response_fusion import ResponseFuser

DRAFTING = ("assistant_model", "prompt_lookup_num_tokens")


def decode(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    cache: Cache | None,
    follower: ResponseFuser | None = None,
    phase: str = "first_token",
    **options: Any,
) -> Any:
    """Generate after a prompt whose first ``T - 1`` positions are in a cache; the last is the first query.

    Args:
        model: The receiver.
        ids: ``(B, T)`` int64, padded left.
        mask: ``(B, T)``.
        cache: Exactly ``T - 1`` positions; None for a prompt of one token, where there is nothing to fuse. It is used up.
        follower: Fuses the last prompt token and what is generated, too.
        phase: What the time to the first token is counted to (:mod:`kvfuse.stages.phases`).
        options: Any of ``generate``: sampling, beams, streamer, stopping criteria, logits processors, assistant, …

    Returns:
        What ``generate`` returns: ``(B, T + new)`` ids, or its output object.
    """
    ids, mask = ids.to(model.device), mask.to(model.device)
    drafted = any(_option(model, options, name) for name in DRAFTING)
    if follower is not None and drafted:
        raise PromptError(
            f"expected none of {', '.join(DRAFTING)} where the response is fused too, got one; leave it out"
        )
    if cache is None:
        with generation(phase, options) as options:
            return model.generate(ids, attention_mask=mask, **options)
    wanted = {
        name: _option(model, options, name) for name in ("num_beams", "num_return_sequences", "cache_implementation")
    }
    copies = max(wanted["num_beams"] or 1, wanted["num_return_sequences"] or 1)
    if follower is not None:
        _reorder_together(cache, follower)
    if copies > 1:  # generate repeats the ids for beams and samples, but not a cache it is given
        cache.reorder_cache(torch.arange(len(ids), device=ids.device).repeat_interleave(copies))
    options["cache_implementation"] = None  # there is a cache already, of the kind and length that were asked for
    options.pop("max_cache_len", None)
    if follower is not None or drafted:
        model = _fed_only_new_tokens(model, follower)
    with generation(phase, options) as options:
        return model.generate(ids, attention_mask=mask, **options, **{CACHE: cache})


def stream(tokenizer: PreTrainedTokenizerBase, run: Callable[[TextIteratorStreamer], Any]) -> Iterator[str]:
    """What a run generates, as text, piece by piece while it goes on in a thread of its own.

    Args:
        tokenizer: The generating model's.
        run: Calls ``generate`` with the streamer that it is given. What it raises is raised here.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():  # which each thread switches for itself
                run(streamer)
        except BaseException as error:  # carried over to the caller's thread
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]


@torch.no_grad()
def score(
    model: PreTrainedModel, prompt: AlignedPrompt, tail: AlignedPrompt, cache: Cache | None
) -> tuple[Tensor, Tensor]:
    """How likely given responses are after their prompts, in one run over the responses alone.

    Args:
        model: The receiver.
        prompt: A batch, padded left.
        tail: The last prompt token and the response of each row (:func:`kvfuse.prompts.response.stack_responses`).
        cache: All prompt positions but the last; None for prompts of one token. It is used up.

    Returns:
        Summed log-probabilities of the response's tokens ``(B,)`` float32, in nats; and ``(B,)`` bool, whether each of them is
        the likeliest at its place.
    """
    mask = torch.cat([prompt.mask[:, :-1], tail.mask], dim=1).to(model.device)
    ids, positions = tail.ids.to(model.device), tail.positions.to(model.device)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE: cache}).logits[:, :-1]
    said = tail.mask[:, 1:].bool().to(logits.device)
    chosen, logits = ids[:, 1:][said], logits[said].float()  # (n,), (n, vocabulary)
    likely = torch.zeros(said.shape, device=said.device).masked_scatter(
        said, logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    )
    greedy = torch.ones_like(said).masked_scatter(said, logits.argmax(-1) == chosen)
    return likely.sum(1), greedy.all(1)


def static_length(model: PreTrainedModel, prompt_length: int, options: dict[str, Any]) -> int | None:
    """How many positions a static cache is to hold where ``options`` ask for one; None for one that grows.

    As transformers has it: one less than there will be tokens, for the last is not read, or ``max_cache_len`` where that is more. A
    receiver is compiled anew for every length.

    Raises:
        PromptError: They ask for a cache that fused keys and values cannot be written into.
    """
    kind = _option(model, options, "cache_implementation")
    if kind not in (None, "dynamic", "static"):
        raise PromptError(f"expected cache_implementation to be dynamic or static, got {kind!r}; choose one of the two")
    new = _option(model, options, "max_new_tokens")
    total = (
        _option(model, options, "max_length") or model.generation_config.max_length
        if new is None
        else prompt_length + new
    )
    return max(total - 1, _option(model, options, "max_cache_len") or 0) if kind == "static" else None


def _option(model: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    config = options.get("generation_config") or model.generation_config
    return options.get(name, getattr(config, name, None))


def _reorder_together(cache: Cache, follower: ResponseFuser) -> None:
    """When ``generate`` reorders the cache it was given, for beams, the follower's caches go along."""
    reorder = cache.reorder_cache

    def both(rows: Tensor) -> None:
        reorder(rows)
        follower.reorder(rows)

    cache.reorder_cache = both


def _fed_only_new_tokens(model: PreTrainedModel, follower: ResponseFuser | None) -> PreTrainedModel:
    """A shallow copy that is never fed a token that its cache holds already, and whose new ones are fused if they are followed.

    Assisted decoding feeds the whole prompt in its first step even when the cache is filled, and answers wrongly without
    an error. The model itself is not touched, for other threads generate with it. ``generate`` reads the names of the arguments
    below, so the mask stands there in full.
    """
    prepare = model.prepare_inputs_for_generation

    def prepare_new(input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        known = 0 if cache is None else cache.get_seq_length()
        if kwargs.get("next_sequence_length") is None and input_ids.shape[1] > known:
            kwargs["next_sequence_length"] = input_ids.shape[1] - known
        if follower is not None:
            seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            follower.feed(cache, input_ids[:, known:], seen)
        return prepare(input_ids, attention_mask=attention_mask, **kwargs)

    twin = copy.copy(model)
    twin.prepare_inputs_for_generation = prepare_new
    return twin
