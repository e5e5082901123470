"""Decode: the receiver goes on from a fused cache, with transformers' own ``generate`` or along given responses."""

import copy
from collections.abc import Callable, Iterator, Sequence
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from kvfuse.backends.offloading import input_device
from kvfuse.cache.transformers_cache import CACHE, cache_arguments
from kvfuse.errors import PromptError
from kvfuse.prompts.alignment import AlignedPrompt
from kvfuse.stages.context import require_one_rope
from kvfuse.stages.generate_options import ASSISTED_DECODING, effective, require_options, resolve, total_length
from kvfuse.stages.phases import generation
from kvfuse.stages.response_fusion import ResponseFuser


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
        PromptError: An option does not go with a filled cache (:mod:`kvfuse.stages.generate_options`) or with fusing
            the response; or the model replaced the cache it was given.
    """
    require_options(model, options)
    device = input_device(model)
    ids, mask = ids.to(device), mask.to(device)
    wanted = effective(model, options)
    is_assisted = any(wanted.get(name) for name in ASSISTED_DECODING)
    if response_fuser is not None and is_assisted:
        raise PromptError(
            f"expected none of {', '.join(ASSISTED_DECODING)} where the response is fused too, got one; leave it out"
        )
    options = resolve(model, options)
    if cache is not None:
        require_one_rope(model, read=cache.get_seq_length(), total=total_length(ids.shape[1], wanted) - 1)
        # 1) generate repeats the ids for beams and samples, but not a cache it is given.
        if response_fuser is not None:
            _reorder_together(cache, response_fuser)
        copies = max(wanted.get("num_beams", 1), wanted.get("num_return_sequences", 1))
        if copies > 1:
            cache.reorder_cache(torch.arange(len(ids), device=ids.device).repeat_interleave(copies))
        # 2) The cache is of the kind and length that were asked for already.
        options |= {"max_cache_len": None, "cache_implementation": None, CACHE: cache}
        if response_fuser is not None or is_assisted:
            model = _fed_only_new_tokens(model, response_fuser)
    else:
        options.setdefault("cache_implementation", None)  # as for longer prompts, not the publisher's recommendation
    with generation(phase, options) as options:
        output = model.generate(ids, attention_mask=mask, **options)
    if cache is not None:
        _require_used(model, cache, output)
    return output


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
    device = input_device(model)
    mask = torch.cat([prompt.mask[:, :-1], tail.mask], dim=1).to(device)
    require_one_rope(model, read=prompt.ids.shape[1] - 1, total=mask.shape[1])
    ids, positions = tail.ids.to(device), tail.positions.to(device)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **cache_arguments(cache)).logits[:, :-1]
    # The vocabulary is large: padding is left out before the softmax.
    is_token = tail.mask[:, 1:].bool().to(logits.device)  # (B, R)
    targets, logits = ids[:, 1:][is_token], logits[is_token].float()  # (n,), (n, vocabulary)
    log_probs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]  # (n,)
    by_row = torch.zeros(is_token.shape, device=is_token.device).masked_scatter(is_token, log_probs)
    greedy = torch.ones_like(is_token).masked_scatter(is_token, logits.argmax(-1) == targets)
    return by_row.sum(1), greedy.all(1)


def _require_used(model: PreTrainedModel, cache: Cache, output: Any) -> None:
    """Refuse an answer for which the model did not read and fill the cache to its end, as some do at some lengths."""
    # A replaced cache stays as short as it was when the model left it
    total = getattr(output, "sequences", output).shape[1]
    used = int(cache.get_seq_length())
    if used < total - 1:  # the last token is not read
        raise PromptError(
            f"expected {type(model).__name__} to answer from the cache it is given, but it left it after {used} of "
            f"{total} tokens; ask for fewer new tokens or use another receiver"
        )


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
