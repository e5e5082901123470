"""Rows -> training examples: a prompt and the response to learn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kvfuse.prompts.messages import Message, Prompt
from kvfuse.support.rows import Row
from kvfuse.training.data.shapes import to_messages
from kvfuse.training.recipe import DataSection

TEXT = "text"  # the format, and the one column, of rows that are documents


@dataclass(frozen=True)
class Example:
    """A training example.

    Attributes:
        prompt: Text or a chat.
        response: The text to learn.
        ends: Whether the answer ends with the response, so that the token that ends it is learnt too.
    """

    prompt: Prompt
    response: str
    ends: bool = True


def examples_of(row: Row, data: DataSection) -> list[Example]:
    """Make the examples of one row: one per turn to learn, or one per piece of a document.

    Raises:
        ValueError: The row is bad; the words before the colon name the kind of error.
    """
    # A row with the one column "text" is a document also without being asked for
    if data.format == TEXT or (data.format == "auto" and row.keys() == {TEXT}):
        return list(_cut_document(_document(row), data))
    return turns(to_messages(row, data.format), data.loss_on)


def turns(chat: Sequence[Message], loss_on: str = "last") -> list[Example]:
    """Take the assistant's last turn, or all its turns, each with everything before it as its prompt.

    With ``all``, a chat of n turns becomes n examples, and each model reads it about n/2 times as often as in one pass:
    the prompt's cache is fused and the response's is not, so that turns cannot share a pass.

    Raises:
        ValueError: The chat does not end with the assistant, or a turn to learn is empty or has no user before it.
    """
    if not chat:
        raise ValueError("wrong roles: no messages")
    if chat[-1]["role"] != "assistant":
        raise ValueError(f"wrong roles: the last message is the {chat[-1]['role']}'s")
    indices = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    return [_turn(chat, index) for index in (indices if loss_on == "all" else indices[-1:])]


def without_oldest_turn(example: Example) -> Example | None:
    """Shorten a chat: drop the first user message and what follows it, up to the next user message.

    System messages stay. None where nothing can be dropped: a text, or a chat with one question left.
    """
    if isinstance(example.prompt, str):
        return None
    system = [message for message in example.prompt if message["role"] == "system"]
    rest = [message for message in example.prompt if message["role"] != "system"]
    # The next question becomes the first
    questions = [index for index, message in enumerate(rest) if message["role"] == "user" and index > 0]
    return replace(example, prompt=[*system, *rest[questions[0] :]]) if questions else None


def _turn(chat: Sequence[Message], index: int) -> Example:
    if all(message["role"] != "user" for message in chat[:index]):
        raise ValueError("wrong roles: the assistant speaks before the user")
    if not chat[index]["content"].strip():
        raise ValueError("empty response: a turn of the assistant without text")
    return Example(list(chat[:index]), chat[index]["content"])


def _document(row: Row) -> str:
    if not isinstance(row.get(TEXT), str):
        raise ValueError(f"unknown shape: no column {TEXT!r} among {', '.join(map(str, row))}")
    return row[TEXT].strip()


def _cut_document(document: str, data: DataSection) -> Iterator[Example]:
    """Cut a document, at white space only, into pieces of a prompt and the response that follows it."""
    start = 0
    while start < len(document):
        cut = _next_space(document, start + data.prompt_characters)
        end = _next_space(document, cut + data.response_characters)
        if cut < end:  # else the rest is a prompt without a response
            yield Example(document[start:cut].lstrip(), document[cut:end], ends=end == len(document))
        start = end


def _next_space(text: str, start: int) -> int:
    return next((index for index in range(start, len(text)) if text[index].isspace()), len(text))
