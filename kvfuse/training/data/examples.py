"""Rows -> examples: a prompt and the response to learn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kvfuse.prompts.chat import Message, Prompt
from kvfuse.support.rows import Row
from kvfuse.training.data.shapes import to_messages
from kvfuse.training.recipe import DataSection

TEXT = "text"
"""The shape of rows that are documents, not chats."""


@dataclass(frozen=True)
class Example:
    """A prompt and the response to learn."""

    prompt: Prompt
    response: str
    ends: bool = True
    """Whether the answer is over after the response, so that the end-of-sequence token is learnt too."""


def examples_of(row: Row, data: DataSection) -> list[Example]:
    """All examples of one row: as many as it has turns to learn, or pieces of a document.

    Raises:
        ValueError: Says what is wrong with the row.
    """
    if data.format == TEXT or (data.format == "auto" and row.keys() == {TEXT}):
        return list(_pieces(_document(row), data))
    return turns(to_messages(row, data.format), data.loss_on)


def turns(chat: Sequence[Message], loss_on: str = "last") -> list[Example]:
    """The assistant's last turn, or each of its turns with everything before as its prompt.

    With ``all``, a chat of n turns becomes n examples: every model reads it about n/2 times as often as in one pass over it,
    for a prompt's cache is fused and the response after it is not.

    Raises:
        ValueError: The chat does not end with the assistant, or a turn to learn is empty or follows nothing.
    """
    if not chat or chat[-1]["role"] != "assistant":
        raise ValueError(
            f"wrong roles: the last message is the {chat[-1]['role']}'s" if chat else "wrong roles: no messages"
        )
    places = [place for place, message in enumerate(chat) if message["role"] == "assistant"]
    return [_turn(chat, place) for place in (places if loss_on == "all" else places[-1:])]


def without_oldest_turn(example: Example) -> Example | None:
    """The same example with less history: the first user's message and what follows it goes, up to the next user's.

    System messages stay. None where nothing can go, as only one question is left.
    """
    if isinstance(example.prompt, str):
        return None
    system = [message for message in example.prompt if message["role"] == "system"]
    rest = [message for message in example.prompt if message["role"] != "system"]
    questions = [place for place, message in enumerate(rest) if message["role"] == "user" and place]
    return replace(example, prompt=[*system, *rest[questions[0] :]]) if questions else None


def _turn(chat: Sequence[Message], place: int) -> Example:
    if all(message["role"] != "user" for message in chat[:place]):
        raise ValueError("wrong roles: the assistant speaks before the user")
    if not chat[place]["content"].strip():
        raise ValueError("empty response: a turn of the assistant without text")
    return Example(list(chat[:place]), chat[place]["content"])


def _document(row: Row) -> str:
    if not isinstance(row.get(TEXT), str):
        raise ValueError(f"unknown shape: no column {TEXT!r} among {', '.join(map(str, row))}")
    return row[TEXT].strip()


def _pieces(document: str, data: DataSection) -> Iterator[Example]:
    """Cut a document, always before white space, into pieces of a prompt and the response that follows it."""
    start = 0
    while start < len(document):
        cut = _next_space(document, start + data.prompt_characters)
        end = _next_space(document, cut + data.response_characters)
        if cut < end:
            yield Example(document[start:cut].lstrip(), document[cut:end], ends=end == len(document))
        start = end


def _next_space(text: str, start: int) -> int:
    return next((place for place in range(start, len(text)) if text[place].isspace()), len(text))
