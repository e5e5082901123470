"""Messages -> the text a model reads, and which characters of it come from messages rather than the template."""

import ast
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import jinja2
from transformers import PreTrainedTokenizerBase

from kvfuse.errors import PromptError
from kvfuse.prompts.template_spans import Layout, Span, find_spans

Message = dict[str, Any]
Prompt = str | Sequence[Message]
"""Plain text, read as it is, or a chat, read through each model's own template."""

TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
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
            parts.
        tokenizer: The model's own, with or without a chat template.
        template_options: Passed to the template, e.g. ``tools=[...]`` or ``enable_thinking=True`` (off by default).

    Raises:
        PromptError: The prompt is empty or of another type, a message has no text, or the template refuses, rewrites or
            leaves out the messages.
    """
    # 1) The text of each message
    _require_prompt(prompt)
    contents = (prompt,) if isinstance(prompt, str) else tuple(map(_content, prompt))
    if not any(map(str.strip, contents)):
        raise PromptError("expected a prompt with text, got an empty one; write a question")
    if isinstance(prompt, str) or not tokenizer.chat_template:
        return _join(contents)
    # 2) The chat as the template writes it: the text is always its own
    options = {"add_generation_prompt": True, "enable_thinking": False, **template_options, "tokenize": False}
    text = _apply(prompt, tokenizer, options)
    # 3) The messages in it: where a chat of this shape had them before, else measured
    template = tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
    shape = template, repr((options, tokenizer.special_tokens_map, _replace_texts(prompt, bool)))
    layouts = _LAYOUTS.setdefault(tokenizer, {})
    layout = layouts.get(shape)
    spans = layout.find(text, contents) if layout else None
    if spans is None:
        roles, words = [str(message.get("role")) for message in prompt], _words(template, tokenizer)

        def render_marked(marks: str) -> str:
            return _apply(_fill_texts(prompt, marks), tokenizer, options)

        spans, layout = find_spans(text=text, contents=contents, roles=roles, words=words, render=render_marked)
    _check_written(prompt, contents, spans)
    if layout:
        _keep(layouts, shape, layout)
    return RenderedPrompt(text, contents, spans, templated=True)


def as_chat(prompt: Prompt) -> Sequence[Message]:
    """Plain text as the one message of a user; a chat unchanged."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _require_prompt(prompt: Any) -> None:
    """Refuse what is neither a text nor a list of messages."""
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise PromptError(
            f"expected a prompt that is a text or a list of messages, got {type(prompt).__name__}; "
            "give a str, or [{'role': ..., 'content': text}]"
        )
    for message in prompt:
        if not isinstance(message, dict):
            raise PromptError(
                "expected messages of the form {'role': ..., 'content': text}, "
                f"got {type(message).__name__}; give a list of dicts"
            )


def _content(message: Message) -> str:
    """The text of a message; one that calls tools may have none."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    # a string is one part
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if len(texts) < len(parts):
        raise PromptError(
            "expected messages of the form {'role': ..., 'content': text}, got one without text; "
            "give its content as a string"
        )
    return "".join(texts)


def _replace_texts(chat: Sequence[Message], new: Callable[[str], Any]) -> list[Message]:
    """The chat with ``new(text)`` in place of each text that is not empty."""

    def replaced(content: str | list[Message]) -> Any:
        return new(content) if isinstance(content, str) else [{**part, "text": new(part["text"])} for part in content]

    return [
        {**message, "content": replaced(message["content"])} if message.get("content") else message for message in chat
    ]


def _fill_texts(chat: Sequence[Message], characters: str) -> list[Message]:
    """The chat with other characters, as many, in place of those of its messages."""
    stream = io.StringIO(characters)
    return _replace_texts(chat, lambda text: stream.read(len(text)))


def _apply(chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    try:
        return tokenizer.apply_chat_template(list(chat), **options)
    except TEMPLATE_ERRORS as error:  # a template is a program and may raise anything
        reason = " ".join(str(error).split())
        raise PromptError(
            f"expected a chat that the model's template accepts, got its error {reason!r}; "
            "use other roles, or contents that are strings"
        ) from error


def _words(template: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Strings that a template may look for in a message: its special tokens, and the literals in its code."""
    yield from map(str, tokenizer.special_tokens_map.values())
    yield from (ast.literal_eval(word) for _, kind, word in jinja2.Environment().lex(template) if kind == "string")


def _keep(layouts: dict[Shape, Layout], shape: Shape, layout: Layout) -> None:
    """Keep a layout as the last used one, and drop the one used longest ago where there are too many."""
    with _LOCK:
        layouts.pop(shape, None)
        layouts[shape] = layout
        if len(layouts) > MAX_LAYOUTS:
            del layouts[next(iter(layouts))]


def _check_written(chat: Sequence[Message], contents: tuple[str, ...], spans: tuple[Span, ...]) -> None:
    # a template may drop a message that is a string, but parts that are missing were not understood
    written = {span.message for span in spans}
    for number, (message, content) in enumerate(zip(chat, contents, strict=True)):
        if isinstance(message.get("content"), list) and content.strip() and number not in written:
            raise PromptError(
                "expected contents that the chat template reads, got a list of parts that it leaves out; give a string"
            )
    if not written:
        raise PromptError(
            "expected a chat template that writes messages, got one that leaves all of them out; use other roles"
        )


def _join(contents: tuple[str, ...]) -> RenderedPrompt:
    """Messages on lines of their own, without a template."""
    spans, start = [], 0
    for number, content in enumerate(contents):
        if content:
            spans.append(Span(start, start + len(content), number, 0))
        start += len(content) + 1
    return RenderedPrompt("\n".join(contents), contents, tuple(spans), templated=False)
