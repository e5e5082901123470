"""The harness's terms in kvfuse's: model arguments make a method, contexts are prompts, options are transformers'."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from kvfuse.language_model import LanguageModel
from kvfuse.methods import Method, MethodContext, Single, find_method, make_method
from kvfuse.model import CacheToCache
from kvfuse.prompts.messages import Message, Prompt

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

DEFAULT_NEW_TOKENS = 256
CHAT_PREFIX = '{"messages": '
SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p")


def load_method(method: str = "cache-to-cache", **options: Any) -> Method:
    """Load a method's models from folders or the Hub; the receiver or the sharer alone needs no fuser.

    Args:
        method: A key of :data:`kvfuse.methods.METHODS`, or the name of an installed one.
        options: Of :meth:`CacheToCache.from_pretrained`, and of :func:`kvfuse.methods.make_method`.

    Raises:
        MethodError, PairError: The method is unknown, or lacks something.
    """
    find_method(method)
    names = {field.name for field in fields(MethodContext)} - {"sharer"}  # a model here, not an index
    settings = {name: options.pop(name) for name in names & options.keys()}
    if "fuser" not in options and method in options:  # the receiver or the sharer
        loading = {key: value for key, value in options.items() if key not in ("receiver", "sharer")}
        return Single(method, LanguageModel.from_pretrained(options[method], **loading))
    return make_method(method, CacheToCache.from_pretrained(**options), **settings)


def from_chat(chat: Sequence[Message]) -> str:
    """Returns a chat as a single string, which is what the harness takes for a context."""
    return json.dumps({"messages": list(chat)}, ensure_ascii=False)


def to_prompt(context: str) -> Prompt:
    """Returns the messages that :func:`from_chat` wrote; any other context is plain text."""
    return json.loads(context)["messages"] if context.startswith(CHAT_PREFIX) else context


def options_key(request: "Instance") -> str:
    """Returns a request's generation options as JSON, to group requests by; empty for other requests."""
    return json.dumps(request.args[1], sort_keys=True) if isinstance(request.args[1], dict) else ""


def group_by(requests: Sequence["Instance"], key: Callable[["Instance"], str]) -> dict[str, list[int]]:
    """Returns the indices of requests by their key."""
    # groups and their members stay in the order of the requests
    groups: dict[str, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        groups[key(request)].append(index)
    return groups


def generation_options(key: str) -> tuple[list[str], dict[str, Any]]:
    """Returns stop strings and options of transformers' ``generate``, without sampling options where it is greedy."""
    options = {"do_sample": False, **json.loads(key)}
    # the harness's names -> transformers'
    until = options.pop("until", None) or []
    options["max_new_tokens"] = options.pop("max_gen_toks", options.get("max_new_tokens", DEFAULT_NEW_TOKENS))
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in SAMPLING_OPTIONS}
    return [until] if isinstance(until, str) else list(until), options


def cut(text: str, stops: Sequence[str]) -> str:
    """Returns a text up to the first of the stop strings; thoughts before the answer are kept whole."""
    # a model that thinks may repeat the question while it does
    thoughts, closing, answer = text.partition("</think>") if "<think>" in text else ("", "", text)
    if closing == "" and thoughts:  # not done with thinking
        return text
    for stop in filter(None, stops):
        answer = answer.split(stop)[0]
    return thoughts + closing + answer
