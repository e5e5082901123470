"""Messages -> the text a model reads, and which characters of it come from messages rather than the template."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import jinja2
from transformers import PreTrainedTokenizerBase

from kvfuse.errors import PromptError
from kvfuse.prompts.chat_options import chat_options_of, split_system, without_system
from kvfuse.prompts.messages import Message, Prompt, fill_texts, join_parts, replace_texts, require_roles, texts_of
from kvfuse.prompts.template_spans import Layout, Span, find_spans

TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
MAX_LAYOUTS = 32

Shape = tuple[str, str]
"""A template, and all that it is given but the characters of the messages."""
_LAYOUTS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[Shape, Layout]] = WeakKeyDictionary()
"""Per tokenizer the layouts of the last chats, the one used longest ago first."""
_LOCK = Lock()


@dataclass(frozen=True)
class RenderedPrompt:
    """The text that a tokenizer is given.

    Attributes:
        text: The whole text, template included.
        messages: The text of each message, in the order of the chat.
        spans: Their positions in ``text``, in its order; the template may leave out a part of a message, or all of it.
        templated: Whether a chat template wrote the text, special tokens included.
    """

    text: str
    messages: tuple[str, ...]
    spans: tuple[Span, ...]
    templated: bool


def render(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, **template_options: Any) -> RenderedPrompt:
    """Render a prompt for one model; without a chat template, messages are joined by line breaks.

    Args:
        prompt: Plain text, or a chat that ends before the answer. Content is text or a list of ``{"type": "text"}``
            parts, which are joined where the template reads strings only.
        tokenizer: The model's own, with or without a chat template.
        template_options: Passed to the template, e.g. ``tools=[...]`` or ``enable_thinking=True`` (off by default).

    Raises:
        PromptError: The prompt is empty or of another type, a message has no role or no text, or the template refuses,
            rewrites or leaves out the messages.
    """
    contents = texts_of(prompt)
    if isinstance(prompt, str):
        return _join(contents)
    if not tokenizer.chat_template:
        require_roles(prompt)
        return _join(contents)
    options = {"add_generation_prompt": True, "enable_thinking": False, **template_options, "tokenize": False}
    joined = join_parts(prompt)
    merged, switched = without_system(joined, contents), chat_options_of(tokenizer).system_in_user
    # 1) The chat as it is, else with strings for parts
    try:
        rendered = _render_parts(prompt, joined, contents, tokenizer, options)
        is_written = any(span.message == 0 for span in rendered.spans)
        if is_written or merged is None or not switched:
            return rendered
    # 2) Else with the system's text before the first user's; an error that stays has another reason
    except PromptError as error:
        if merged is None:
            raise
        if not switched:
            _render_chat(merged, texts_of(merged), tokenizer, options)
            raise PromptError(f"{error}; or load the model with system_in_user=True") from error
    rendered = _render_chat(merged, texts_of(merged), tokenizer, options)
    return replace(rendered, messages=contents, spans=split_system(rendered.spans, contents))


def _render_parts(
    chat: Sequence[Message],
    joined: Sequence[Message],
    contents: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
) -> RenderedPrompt:
    """The chat, or where its template reads strings only, the chat with one string for each message's parts."""
    try:
        return _render_chat(chat, contents, tokenizer, options)
    except PromptError:
        if joined == chat:
            raise
    return _render_chat(joined, contents, tokenizer, options)


def _render_chat(
    chat: Sequence[Message], contents: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> RenderedPrompt:
    # 1) The chat as the template writes it: the text is always its own
    text = _apply(chat, tokenizer, options)
    template = tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
    require_roles(chat, lambda: _literals(template))
    # 2) The messages in it: where a chat of this shape had them before, else measured
    shape = template, repr((options, tokenizer.special_tokens_map, replace_texts(chat, bool)))
    layouts = _LAYOUTS.setdefault(tokenizer, {})
    layout = layouts.get(shape)
    spans = layout.find(text, contents) if layout else None
    if spans is None:
        roles = [message["role"] for message in chat]
        words = [*map(str, tokenizer.special_tokens_map.values()), *_literals(template)]

        def render_marked(marks: str) -> str:
            return _apply(fill_texts(chat, marks), tokenizer, options)

        spans, layout = find_spans(text=text, contents=contents, roles=roles, words=words, render=render_marked)
    _check_written(chat, contents, spans, template)
    if layout:
        _keep(layouts, shape, layout)
    return RenderedPrompt(text, contents, spans, templated=True)


def _apply(chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    try:
        return tokenizer.apply_chat_template(list(chat), **options)
    except jinja2.TemplateSyntaxError as error:
        raise PromptError(
            f"expected a chat template in Jinja, got {error.message!r} in its line {error.lineno}; correct the template"
        ) from error
    except TEMPLATE_ERRORS as error:  # a template is a program and may raise anything
        reason = " ".join(str(error).split())
        raise PromptError(
            f"expected a chat that the model's template accepts, got its error {reason!r}; "
            "use other roles, or contents that are strings"
        ) from error


@lru_cache(maxsize=MAX_LAYOUTS)
def _literals(template: str) -> tuple[str, ...]:
    """The strings in a template's code as Jinja reads them, not Python; strings that follow each other are one."""
    tokens = jinja2.Environment().lexer.tokenize(template)
    groups = groupby(tokens, key=attrgetter("type"))
    return tuple("".join(token.value for token in group) for kind, group in groups if kind == "string")


def _keep(layouts: dict[Shape, Layout], shape: Shape, layout: Layout) -> None:
    """Keep a layout as the last used one, and drop the one used longest ago where there are too many."""
    with _LOCK:
        layouts.pop(shape, None)
        layouts[shape] = layout
        if len(layouts) > MAX_LAYOUTS:
            del layouts[next(iter(layouts))]


def _check_written(chat: Sequence[Message], contents: tuple[str, ...], spans: tuple[Span, ...], template: str) -> None:
    """Refuse a chat of which a message is missing from the text because the template does not know its form or role."""
    written = {span.message for span in spans}
    if not written:
        raise PromptError(
            "expected a chat template that writes messages, got one that leaves all of them out; use other roles"
        )
    for number, (message, content) in enumerate(zip(chat, contents, strict=True)):
        if number in written or not content.strip():
            continue
        # a template may drop a message that is a string, but parts that are missing were not understood
        if isinstance(message.get("content"), list):
            raise PromptError(
                "expected contents that the chat template reads, got a list of parts that it leaves out; give a string"
            )
        if message["role"] not in _literals(template):
            raise PromptError(
                f"expected a role that the chat template writes, got {message['role']!r}, which it leaves out; "
                "use another role"
            )


def _join(contents: tuple[str, ...]) -> RenderedPrompt:
    """Messages on lines of their own, without a template."""
    spans, start = [], 0
    for number, content in enumerate(contents):
        if content:
            spans.append(Span(start, start + len(content), number, 0))
        start += len(content) + 1
    return RenderedPrompt("\n".join(contents), contents, tuple(spans), templated=False)
