"""The shapes that chat data comes in: one row -> one chat. Which shape a row has is read off its columns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvfuse.prompts.chat import Message
from kvfuse.prompts.multiple_choice import ANSWER_STEM

Row = dict[str, Any]
SPEAKERS = {
    "assistant": ("gpt", "chatgpt", "bot", "model", "function_call"),  # a call is what the assistant says
    "user": ("human",),
    "system": (),
    "tool": ("observation", "function", "function_response"),
}
ROLES = {name: role for role, names in SPEAKERS.items() for name in (role, *names)}


def messages(row: Row) -> list[Message]:
    """``messages``: the form that models' templates take; what else a message holds is kept, as tool calls."""
    return [
        {**{key: value for key, value in one.items() if value is not None}, **_say(one["role"], one["content"])}
        for one in row["messages"]
    ]


def sharegpt(row: Row) -> list[Message]:
    """``conversations`` of ``from`` and ``value``, as ShareGPT and OpenHermes-2.5 have them; a ``tools`` column is not read."""
    chat = [
        _say(one.get("from") or one["role"], one.get("value") or one.get("content")) for one in row["conversations"]
    ]
    system = row.get("system") or row.get("system_prompt")
    return chat if not system or chat[0]["role"] == "system" else [_say("system", system), *chat]


def alpaca(row: Row) -> list[Message]:
    """``instruction``, ``input`` (may be empty) and ``output``; optional ``system`` and ``history``, pairs of question and answer."""
    request = "\n\n".join(part for part in (_text(row["instruction"]), _text(row.get("input"))) if part)
    system = [_say("system", row["system"])] if row.get("system") else []
    history = [message for question, answer in row.get("history") or [] for message in _exchange(question, answer)]
    return [*system, *history, *_exchange(request, row["output"])]


def mmlu(row: Row) -> list[Message]:
    """MMLU: ``question``, ``choices`` and ``answer``, the place of the right one."""
    return _multiple_choice(row["question"], row["choices"], row["answer"])


def openbookqa(row: Row) -> list[Message]:
    """OpenBookQA and ARC: ``choices`` of ``text`` and ``label``, ``answerKey``, and ``question_stem`` or ``question``."""
    labels = row["choices"]["label"]
    if row["answerKey"] not in labels:
        raise ValueError(f"wrong shape: answerKey {row['answerKey']!r} is none of {labels}")
    return _multiple_choice(
        row.get("question_stem") or row["question"], row["choices"]["text"], labels.index(row["answerKey"])
    )


def longbench(row: Row) -> list[Message]:
    """LongBench-E: ``context``, ``input``, the question, which may be empty, and ``answers``, of which the first is learnt."""
    request = [
        f"Read this and answer the question that follows.\n\n{_text(row['context'])}",
        f"Question: {_text(row['input'])}",
    ]
    return _exchange("\n\n".join(request) if row["input"] else _text(row["context"]), row["answers"][0])


def pairs(row: Row) -> list[Message]:
    """``prompt`` and ``response``; a row without a response is a prompt to ask."""
    return _exchange(row["prompt"], row["response"]) if "response" in row else [_say("user", row["prompt"])]


@dataclass(frozen=True)
class Shape:
    """Which columns a shape has, and the function that reads it."""

    columns: frozenset[str]
    read: Callable[[Row], list[Message]]


SHAPES: dict[str, Shape] = {
    "messages": Shape(frozenset({"messages"}), messages),
    "sharegpt": Shape(frozenset({"conversations"}), sharegpt),
    "alpaca": Shape(frozenset({"instruction", "output"}), alpaca),
    "openbookqa": Shape(frozenset({"choices", "answerKey"}), openbookqa),
    "mmlu": Shape(frozenset({"question", "choices", "answer"}), mmlu),
    "longbench": Shape(frozenset({"input", "context", "answers"}), longbench),
    "pairs": Shape(frozenset({"prompt"}), pairs),
}


def to_messages(row: Row, shape: str = "auto") -> list[Message]:
    """Read a row as a chat.

    Args:
        row: Columns and values.
        shape: A key of :data:`SHAPES`; ``auto`` takes the first whose columns are there.

    Returns:
        Messages of ``role`` and ``content``, the content a text.

    Raises:
        ValueError: Says what is wrong with the row; the words before the colon are its kind.
    """
    name = next((name for name, one in SHAPES.items() if one.columns <= row.keys()), None) if shape == "auto" else shape
    if name is None:
        raise ValueError(f"unknown shape: columns {', '.join(map(str, row))}")
    try:
        return SHAPES[name].read(row)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"wrong shape: not a row of the shape {name} ({type(error).__name__}: {error})") from error


def _multiple_choice(question: str, choices: Sequence[str], answer: int) -> list[Message]:
    """The question as all multiple-choice sets ask it, and the answer in a form that can be read off (paper, A.3.5)."""
    if not 0 <= answer < len(choices) <= 26:
        raise ValueError(f"wrong shape: answer {answer} to {len(choices)} choices")
    letters = [chr(ord("A") + place) for place in range(len(choices))]
    lines = [f"{letter}. {_text(choice)}" for letter, choice in zip(letters, choices, strict=True)]
    form = f'Compare all choices, settle on the best one, and reply in this form alone: "{ANSWER_STEM} X."'
    request = "\n".join([f"Question: {_text(question)}", "", "Choices:", *lines, "", form])
    return _exchange(request, f"{ANSWER_STEM} {letters[answer]}.")


def _exchange(request: Any, answer: Any) -> list[Message]:
    return [_say("user", request), _say("assistant", answer)]


def _say(speaker: str, content: Any) -> Message:
    if speaker not in ROLES:
        raise ValueError(f"wrong roles: unknown {speaker!r}")
    return {"role": ROLES[speaker], "content": _text(content)}


def _text(content: Any) -> str:
    """Text as it is, or its parts put together; nothing at all is an empty text."""
    if isinstance(content, list):
        return "".join(
            _text(part.get("text", part.get("value")) if part.get("type", "text") == "text" else part)
            for part in content
        )
    if content is not None and not isinstance(content, str):
        raise ValueError(f"wrong shape: expected text, got {content!r:.60}")
    return content or ""
