"""Messages -> the text a model reads, and which characters of it are message and not template."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from kvfuse.errors import PromptError

Message = dict[str, Any]
Prompt = str | Sequence[Message]
"""Plain text, read as it is, or a chat, read through each model's own template."""


@dataclass(frozen=True)
class Span:
    """The characters of one message in a rendered text.

    Attributes:
        start: First character in the text.
        end: One past the last.
        skipped: Characters of the message that the template trimmed off its front.
    """

    start: int
    end: int
    skipped: int = 0


@dataclass(frozen=True)
class RenderedPrompt:
    """What a tokenizer is given.

    Attributes:
        text: The whole text, template included.
        messages: The messages as the user wrote them, in order.
        spans: Where each message stands in ``text``.
        templated: Whether a chat template wrote the text, special tokens included.
    """

    text: str
    messages: tuple[str, ...]
    spans: tuple[Span, ...]
    templated: bool


def render(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, **template_options: Any) -> RenderedPrompt:
    """Render a prompt for one model; without a chat template, messages are joined by line breaks.

    Args:
        prompt: Plain text or a chat that ends before the answer.
        tokenizer: The model's own, with or without a chat template.
        template_options: Passed to the template, e.g. ``enable_thinking=True`` (off unless said).

    Raises:
        PromptError: The prompt is empty, a message has no text, or the template rewrites a message.
    """
    contents = _contents(prompt)
    if isinstance(prompt, str) or not tokenizer.chat_template:
        return _join(contents, "\n")
    options = {"add_generation_prompt": True, "enable_thinking": False, **template_options, "tokenize": False}
    text = tokenizer.apply_chat_template(list(prompt), **options)
    return RenderedPrompt(text, contents, _find_spans(text, contents, _sections(prompt, tokenizer, options)), templated=True)


def as_chat(prompt: Prompt) -> Sequence[Message]:
    """A chat as it is; plain text as the one message of a user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _contents(prompt: Prompt) -> tuple[str, ...]:
    contents: tuple[Any, ...] = (prompt,) if isinstance(prompt, str) else tuple(message.get("content") for message in prompt)
    if not all(isinstance(content, str) for content in contents):
        raise PromptError(
            "expected messages of the form {'role': ..., 'content': text}, got one without text; give its content as a string"
        )
    if not any(content.strip() for content in contents):
        raise PromptError("expected a prompt with text, got an empty one; write a question")
    return contents


def _join(contents: tuple[str, ...], separator: str) -> RenderedPrompt:
    spans, start = [], 0
    for content in contents:
        spans.append(Span(start, start + len(content)))
        start += len(content) + len(separator)
    return RenderedPrompt(separator.join(contents), contents, tuple(spans), templated=False)


def _sections(chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> list[str]:
    """The template's own text around the messages: one section before each, one after the last.

    Found by rendering the chat once more with a marker in place of every content, which no text can contain by accident.
    """
    markers = [f"kvfuse{secrets.token_hex(8)}" for _ in chat]
    marked = [{**message, "content": marker} for message, marker in zip(chat, markers, strict=True)]
    rest, sections = tokenizer.apply_chat_template(marked, **options), []
    for marker in markers:
        section, found, rest = rest.partition(marker)
        if not found:
            raise PromptError(
                "expected a chat template that writes every message once and in order, got one that does not; use other roles"
            )
        sections.append(section)
    return [*sections, rest]


def _find_spans(text: str, contents: tuple[str, ...], sections: list[str]) -> tuple[Span, ...]:
    """Walk along the text: section, message, section, …, where a template may have trimmed a message."""
    spans, end = [], 0
    for content, before, after in zip(contents, sections, sections[1:], strict=False):
        start = end + len(before)
        kept = next((kept for kept in (content, content.strip()) if text.startswith(kept + after, start)), None)
        if kept is None or text[end:start] != before:
            raise PromptError(
                f"expected a chat template that keeps messages as they are, got one that rewrites {content[:40]!r}; simplify it"
            )
        end = start + len(kept)
        spans.append(Span(start, end, len(content) - len(content.lstrip()) if kept != content else 0))
    return tuple(spans)
