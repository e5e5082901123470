"""Messages -> the text a model reads, and which characters of it are message and not template."""

import ast
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from kvfuse.errors import PromptError
from kvfuse.prompts.template_spans import Span, find_spans

Message = dict[str, Any]
Prompt = str | Sequence[Message]
"""Plain text, read as it is, or a chat, read through each model's own template."""

TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class RenderedPrompt:
    """What a tokenizer is given.

    Attributes:
        text: The whole text, template included.
        messages: What the messages say, in the order of the chat.
        spans: Where they stand in ``text``, in its order; the template may leave out a part of a message, or all of it.
        templated: Whether a chat template wrote the text, special tokens included.
    """

    text: str
    messages: tuple[str, ...]
    spans: tuple[Span, ...]
    templated: bool


def render(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, **template_options: Any) -> RenderedPrompt:
    """Render a prompt for one model; without a chat template, messages are joined by line breaks.

    Args:
        prompt: Plain text or a chat that ends before the answer. Content is text, or a list of ``{"type": "text"}`` parts.
        tokenizer: The model's own, with or without a chat template.
        template_options: Passed to the template, e.g. ``tools=[...]`` or ``enable_thinking=True`` (off unless said).

    Raises:
        PromptError: The prompt is empty, a message has no text, or the template refuses, rewrites or leaves out the messages.
    """
    contents = _contents(prompt)
    if isinstance(prompt, str) or not tokenizer.chat_template:
        return _join(contents, "\n")
    options = {"add_generation_prompt": True, "enable_thinking": False, **template_options, "tokenize": False}
    text = _apply(prompt, tokenizer, options)
    roles = [str(message.get("role")) for message in prompt]
    spans = find_spans(
        text, contents, roles, _words(tokenizer, options), lambda said: _apply(_say(prompt, said), tokenizer, options)
    )
    _check_written(prompt, contents, spans)
    return RenderedPrompt(text, contents, spans, templated=True)


def as_chat(prompt: Prompt) -> Sequence[Message]:
    """A chat as it is; plain text as the one message of a user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _contents(prompt: Prompt) -> tuple[str, ...]:
    contents = (prompt,) if isinstance(prompt, str) else tuple(map(_content, prompt))
    if not any(content.strip() for content in contents):
        raise PromptError("expected a prompt with text, got an empty one; write a question")
    return contents


def _content(message: Message) -> str:
    """What a message says; one that calls tools may say nothing."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    parts = (
        [part.get("text") if isinstance(part, dict) else None for part in content]
        if isinstance(content, list)
        else [content]
    )
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise PromptError(
            "expected messages of the form {'role': ..., 'content': text}, got one without text; give its content as a string"
        )
    return "".join(texts)


def _say(chat: Sequence[Message], said: str) -> list[Message]:
    """The chat with other characters, as many, in place of what its messages say."""
    read = io.StringIO(said).read

    def filled(content: str | list[Message]) -> str | list[Message]:
        return (
            read(len(content))
            if isinstance(content, str)
            else [{**part, "text": read(len(part["text"]))} for part in content]
        )

    return [
        {**message, "content": filled(message["content"])} if message.get("content") else message for message in chat
    ]


def _apply(chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    try:
        return tokenizer.apply_chat_template(list(chat), **options)
    except TEMPLATE_ERRORS as error:  # the template is a program of the model's makers
        reason = " ".join(str(error).split())
        raise PromptError(
            f"expected a chat that the model's template accepts, got its error {reason!r}; use other roles, or contents that are strings"
        ) from error


def _words(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> Iterator[str]:
    """What a template may look for in a message: the strings in its code, and the special tokens it is given."""
    yield from map(str, tokenizer.special_tokens_map.values())
    template = tokenizer.get_chat_template(options.get("chat_template"), options.get("tools"))
    yield from (ast.literal_eval(word) for _, kind, word in jinja2.Environment().lex(template) if kind == "string")


def _check_written(chat: Sequence[Message], contents: tuple[str, ...], spans: tuple[Span, ...]) -> None:
    written = {span.message for span in spans}
    unread = [
        i
        for i, message in enumerate(chat)
        if isinstance(message.get("content"), list) and contents[i].strip() and i not in written
    ]
    if unread:
        raise PromptError(
            "expected contents that the chat template reads, got a list of parts that it leaves out; give a string"
        )
    if not written:
        raise PromptError(
            "expected a chat template that writes messages, got one that leaves all of them out; use other roles"
        )


def _join(contents: tuple[str, ...], separator: str) -> RenderedPrompt:
    spans, start = [], 0
    for number, content in enumerate(contents):
        if content:
            spans.append(Span(start, start + len(content), number, 0))
        start += len(content) + len(separator)
    return RenderedPrompt(separator.join(contents), contents, tuple(spans), templated=False)
