"""Messages of a chat: which ones are accepted, the text of each, and the same chat with other texts."""

import io
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

from kvfuse.errors import PromptError

Message = dict[str, Any]
Prompt = str | Sequence[Message]
"""Plain text, read as it is, or a chat, read through each model's own template."""

Prompts = Prompt | Sequence[Prompt]
"""One text or chat, or several."""

ROLES = ("system", "developer", "user", "assistant", "tool")
FORM = "{'role': ..., 'content': text}"


def as_chat(prompt: Prompt) -> Sequence[Message]:
    """Plain text as the one message of a user; a chat unchanged."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def is_single(prompts: Prompts) -> bool:
    """Whether these are one text or chat, not several."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))


def as_batch(prompts: Prompts) -> Sequence[Prompt]:
    """One or several prompts as several; each is checked when it is rendered."""
    if not _is_sequence(prompts):
        raise PromptError(
            f"expected a text, a chat or a list of them, got {type(prompts).__name__}; give a str or a list"
        )
    if not prompts and not isinstance(prompts, str):
        raise PromptError("expected at least one prompt, got an empty list; write a question")
    return cast("Sequence[Prompt]", [prompts] if is_single(prompts) else prompts)


def texts_of(prompt: Any) -> tuple[str, ...]:
    """The text of each message of a prompt; plain text is one message.

    Raises:
        PromptError: It is neither a text nor a list of messages with a role and a text, or has no text at all.
    """
    if isinstance(prompt, str):
        texts: tuple[str, ...] = (prompt,)
    elif not _is_sequence(prompt):
        raise PromptError(
            f"expected a prompt that is a text or a list of messages, got {type(prompt).__name__}; "
            "give a str, or [{'role': ..., 'content': text}]"
        )
    else:
        texts = tuple(map(_text, prompt))
    if not any(map(str.strip, texts)):
        raise PromptError("expected a prompt with text, got an empty one; write a question")
    return texts


def require_roles(chat: Sequence[Message], others: Callable[[], Collection[str]] = tuple) -> None:
    """Refuse roles other than :data:`ROLES`, which templates write like any other but no model was trained on.

    Args:
        chat: The messages.
        others: Gives more roles; called where they are needed.
    """
    for role in dict.fromkeys(message["role"] for message in chat):
        if role not in ROLES and role not in others():
            raise PromptError(
                f"expected the roles {', '.join(ROLES)}, or one that the chat template names, got {role!r}; choose one"
            )


def join_parts(chat: Sequence[Message]) -> list[Message]:
    """The chat with one string in place of each content that is a list of parts."""
    return [
        {**message, "content": _text(message)} if isinstance(message.get("content"), list) else message
        for message in chat
    ]


def replace_texts(chat: Sequence[Message], new: Callable[[str], Any]) -> list[Message]:
    """The chat with ``new(text)`` in place of each text that is not empty."""

    def replaced(content: str | list[Message]) -> Any:
        return new(content) if isinstance(content, str) else [{**part, "text": new(part["text"])} for part in content]

    return [
        {**message, "content": replaced(message["content"])} if message.get("content") else message for message in chat
    ]


def fill_texts(chat: Sequence[Message], characters: str) -> list[Message]:
    """The chat with other characters, as many, in place of those of its messages."""
    stream = io.StringIO(characters)
    return replace_texts(chat, lambda text: stream.read(len(text)))


def _is_sequence(value: Any) -> bool:
    """Whether a value is a text or a list, not bytes."""
    return isinstance(value, Sequence) and not isinstance(value, bytes | bytearray)


def _text(message: Any) -> str:
    """The text of a message; one that calls tools may have none."""
    if not isinstance(message, dict):
        raise PromptError(f"expected messages of the form {FORM}, got {type(message).__name__}; give a list of dicts")
    if not isinstance(message.get("role"), str):
        raise PromptError(f"expected messages of the form {FORM}, got one without a role; name one, such as 'user'")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    # a string is one part
    return "".join(map(_part, content if isinstance(content, list) else [{"text": content}]))


def _part(part: Any) -> str:
    """The text of a part of a message."""
    if isinstance(part, dict) and part.get("type", "text") != "text":
        raise PromptError(f"expected parts of text, got one of type {part['type']!r}; leave it out")
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise PromptError(
            f"expected messages of the form {FORM}, got one without text; give its content as a string, "
            "or as a list of {'type': 'text', 'text': ...}"
        )
    return str(part["text"])
