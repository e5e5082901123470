"""How one model reads chats, beside what its template says: two switches, both off as in transformers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from kvfuse.prompts.messages import Message
from kvfuse.prompts.template_spans import Span
from kvfuse.support.config import Section

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class ChatOptions:
    """Switches of a model's tokenizer.

    Attributes:
        escape_special_tokens: Read the names of special tokens in messages as plain text, so that nobody's message can
            end a turn or begin another one; of tokens that are not special, those that the chat template writes.
        system_in_user: Where the template refuses a system message, put its text before the first user message.
    """

    escape_special_tokens: bool = False
    system_in_user: bool = False


class ChatOptionKeys(Section):
    """The switches as keys of a recipe, for all of its models."""

    escape_special_tokens: bool = False
    """Read the names of special tokens in messages as plain text."""
    system_in_user: bool = False
    """Put a system message before the first user's, for models whose template refuses one."""

    @property
    def chat_options(self) -> ChatOptions:
        """The switches."""
        return ChatOptions(self.escape_special_tokens, self.system_in_user)


CHAT_OPTIONS = tuple(field.name for field in fields(ChatOptions))
ATTRIBUTE = "_kvfuse_chat_options"
"""Of a tokenizer: its switches go where it goes, into copies and other processes."""


def set_chat_options(tokenizer: PreTrainedTokenizerBase, options: ChatOptions) -> None:
    """Set the switches of a tokenizer, for all that reads with it from now on."""
    setattr(tokenizer, ATTRIBUTE, options)


def chat_options_of(tokenizer: PreTrainedTokenizerBase) -> ChatOptions:
    """The switches of a tokenizer."""
    return cast("ChatOptions", vars(tokenizer).get(ATTRIBUTE, ChatOptions()))


def cuts(text: str, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Where to cut a text so that no token's name is left whole in a message: after the name's first character.

    Args:
        text: As the template wrote it.
        spans: The characters of messages in it.
        tokenizer: The model's.

    Returns:
        Positions in the text; none where the switch is off.
    """
    return _cuts(text, spans, _control_names(tokenizer)) if chat_options_of(tokenizer).escape_special_tokens else ()


def response_cuts(text: str, start: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The same for a response, which a text holds from ``start`` on.

    Only the names of special tokens are cut: an answer's text never holds such a token, since decoding leaves it out,
    but it holds the others that a model writes, as ``<think>``.
    """
    if not chat_options_of(tokenizer).escape_special_tokens:
        return ()
    return _cuts(text, [Span(start, len(text), 0, 0)], _special_names(tokenizer))


def _cuts(text: str, spans: Sequence[Span], names: Sequence[str]) -> tuple[int, ...]:
    found = set()
    # Each place where such a name stands, overlapping ones too
    for span in spans:
        for name in names:
            # A name may begin or end outside of the message, as far as one character is within
            start = text.find(name, max(span.start - len(name) + 1, 0), span.end + len(name) - 1)
            while start >= 0:
                found.add(start + 1)
                start = text.find(name, start + 1, span.end + len(name) - 1)
    return tuple(sorted(found))


def without_system(chat: Sequence[Message], contents: tuple[str, ...]) -> list[Message] | None:
    """The chat with the system's text before that of the first user; None where it has no such two messages."""
    if len(chat) < 2 or chat[0]["role"] != "system" or chat[1]["role"] != "user":
        return None
    return [{**chat[1], "content": contents[0] + SEPARATOR + contents[1]}, *chat[2:]]


def split_system(spans: Sequence[Span], contents: tuple[str, ...]) -> tuple[Span, ...]:
    """The spans of :func:`without_system`'s chat as those of the original messages."""
    ends, begins = len(contents[0]), len(contents[0]) + len(SEPARATOR)
    original: list[Span] = []
    for span in spans:
        if span.message > 0:
            original.append(Span(span.start, span.end, span.message + 1, span.offset))
            continue
        # The first message holds two: what lies before the separator, and what lies behind it
        last = span.offset + span.end - span.start
        for message, low, high in ((0, 0, ends), (1, begins, last)):
            first, end = max(span.offset, low), min(last, high)
            if first < end:
                start = span.start + first - span.offset
                original.append(Span(start, start + end - first, message, first - low))
    return tuple(original)


def _control_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the tokenizer would read as one token: special tokens, and those that the template writes."""
    template: Any = tokenizer.chat_template or ""
    written = template if isinstance(template, str) else " ".join(template.values())
    # White space that is one token is no control token, though it stands in every template
    named = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if not token.special and len(token.content.strip()) > 1 and token.content in written
    ]
    return [*_special_names(tokenizer), *named]


def _special_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    return [token.content for token in added if token.special and len(token.content) > 1]
