"""What the harness asks for, in kvfuse's terms: contexts are prompts, generation options those of transformers."""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvfuse.prompts.chat import Message, Prompt

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

DEFAULT_NEW_TOKENS = 256
CHAT = '{"messages": '


def from_chat(chat: Sequence[Message]) -> str:
    """A chat as the one string that the harness takes for a context."""
    return json.dumps({"messages": list(chat)}, ensure_ascii=False)


def to_prompt(context: str) -> Prompt:
    """The messages that :func:`from_chat` wrote; any other context is plain text."""
    return json.loads(context)["messages"] if context.startswith(CHAT) else context


def options_key(request: "Instance") -> str:
    """What to group requests by: how to generate, in JSON, if that is asked at all."""
    return json.dumps(request.args[1], sort_keys=True) if isinstance(request.args[1], dict) else ""


def by_options(requests: Sequence["Instance"]) -> dict[str, list[int]]:
    """The places of requests by :func:`options_key`."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        groups[options_key(request)].append(place)
    return groups


def generation_options(key: str) -> tuple[list[str], dict[str, Any]]:
    """Strings to stop at, and options of transformers' ``generate``, which has none of sampling where it is not asked for."""
    options = {"do_sample": False, **json.loads(key)}
    until = options.pop("until", None) or []
    options["max_new_tokens"] = options.pop("max_gen_toks", options.get("max_new_tokens", DEFAULT_NEW_TOKENS))
    if not options["do_sample"]:
        options = {
            key: value for key, value in options.items() if key not in ("temperature", "top_p", "top_k", "min_p")
        }
    return [until] if isinstance(until, str) else list(until), options


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the strings to stop at."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text
