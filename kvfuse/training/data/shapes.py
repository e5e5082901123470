"""Shapes of chat data: reads a row as one chat. The shape is recognised by the row's columns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from kvfuse.prompts.messages import Message
from kvfuse.prompts.multiple_choice import ANSWER_STEM
from kvfuse.support.rows import Row

ROLES = {
    # A function call is text that the assistant writes
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("user", "human"), "user"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
}
ANSWER_FORM = f'Compare all choices, settle on the best one, and reply in this form alone: "{ANSWER_STEM} X."'


def messages(row: Row) -> list[Message]:
    """``messages``, as chat templates take them. Other keys of a message, such as tool calls, are kept."""
    return [
        {key: value for key, value in message.items() if value is not None}
        | _message(message["role"], message["content"])
        for message in row["messages"]
    ]


def sharegpt(row: Row) -> list[Message]:
    """``conversations`` of ``from`` and ``value``, as in ShareGPT and OpenHermes-2.5. A column ``tools`` is ignored."""
    chat = [
        _message(turn.get("from") or turn["role"], turn.get("value") or turn.get("content"))
        for turn in row["conversations"]
    ]
    # The system message is the first turn or a column
    system = row.get("system") or row.get("system_prompt")
    return chat if not system or chat[0]["role"] == "system" else [_message("system", system), *chat]


def alpaca(row: Row) -> list[Message]:
    """``instruction``, ``input`` (may be empty) and ``output``; optional ``system`` and ``history`` of exchanges."""
    request = "\n\n".join(part for part in (_text(row["instruction"]), _text(row.get("input"))) if part)
    system = [_message("system", row["system"])] if row.get("system") else []
    history = [message for question, answer in row.get("history") or [] for message in _exchange(question, answer)]
    return [*system, *history, *_exchange(request, row["output"])]


def mmlu(row: Row) -> list[Message]:
    """MMLU: ``question``, ``choices`` and ``answer``, the index of the right choice."""
    return _multiple_choice(row["question"], row["choices"], row["answer"])


def openbookqa(row: Row) -> list[Message]:
    """OpenBookQA, ARC: ``choices`` of ``text`` and ``label``, ``answerKey``; ``question_stem`` or ``question``."""
    labels = row["choices"]["label"]
    if row["answerKey"] not in labels:
        raise ValueError(f"wrong shape: answerKey {row['answerKey']!r} is none of {labels}")
    question = row.get("question_stem") or row["question"]
    return _multiple_choice(question, row["choices"]["text"], labels.index(row["answerKey"]))


def longbench(row: Row) -> list[Message]:
    """LongBench-E: ``context``, ``input`` (the question, may be empty) and ``answers``; the first is learnt."""
    context = _text(row["context"])
    if row["input"]:
        context = f"Read this and answer the question that follows.\n\n{context}\n\nQuestion: {_text(row['input'])}"
    return _exchange(context, row["answers"][0])


def mbpp(row: Row) -> list[Message]:
    """MBPP: ``text``, the request; ``test_list``, of which the first is shown; ``code``."""
    request = f"{_text(row['text'])}\nReply with the code alone. It must pass:\n{row['test_list'][0]}"
    code = _text(row["code"]).replace("\r\n", "\n").replace("\t", "    ").strip("\n").rstrip()
    return [_message("system", "You write Python."), *_exchange(request, code)]


def pairs(row: Row) -> list[Message]:
    """``prompt`` and ``response``. A row without a response is a prompt to generate one for."""
    return _exchange(row["prompt"], row["response"]) if "response" in row else [_message("user", row["prompt"])]


@dataclass(frozen=True)
class Shape:
    """The columns that identify a shape, and the function that reads it."""

    columns: frozenset[str]
    read: Callable[[Row], list[Message]]


SHAPES: dict[str, Shape] = {
    "messages": Shape(frozenset({"messages"}), messages),
    "sharegpt": Shape(frozenset({"conversations"}), sharegpt),
    "alpaca": Shape(frozenset({"instruction", "output"}), alpaca),
    "openbookqa": Shape(frozenset({"choices", "answerKey"}), openbookqa),
    "mmlu": Shape(frozenset({"question", "choices", "answer"}), mmlu),
    "longbench": Shape(frozenset({"input", "context", "answers"}), longbench),
    "mbpp": Shape(frozenset({"text", "code", "test_list"}), mbpp),
    "pairs": Shape(frozenset({"prompt"}), pairs),
}


def to_messages(row: Row, shape: str = "auto") -> list[Message]:
    """Read a row as a chat.

    Args:
        row: Columns and values.
        shape: A key of :data:`SHAPES`; ``auto`` takes the first whose columns are all there.

    Returns:
        Messages of ``role`` and ``content``, which is a string.

    Raises:
        ValueError: The row has no such shape; the words before the colon name the kind of error.
    """
    # 1) Recognise the shape
    if shape == "auto":
        matches = [name for name, known in SHAPES.items() if known.columns <= row.keys()]
        if not matches:
            raise ValueError(f"unknown shape: columns {', '.join(map(str, row))}")
        shape = matches[0]
    # 2) Read it; readers take columns and types for granted
    try:
        return SHAPES[shape].read(row)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"wrong shape: not a row of the shape {shape} ({type(error).__name__}: {error})") from error


def _multiple_choice(question: str, choices: Sequence[str], answer: int) -> list[Message]:
    """Word a question alike for all multiple-choice sets, with an answer that can be extracted (paper, A.3.5)."""
    if not 0 <= answer < len(choices) <= len(ascii_uppercase):
        raise ValueError(f"wrong shape: answer {answer} to {len(choices)} choices")
    lines = [f"{letter}. {_text(choice)}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    request = "\n".join([f"Question: {_text(question)}", "", "Choices:", *lines, "", ANSWER_FORM])
    return _exchange(request, f"{ANSWER_STEM} {ascii_uppercase[answer]}.")


def _exchange(request: Any, answer: Any) -> list[Message]:
    return [_message("user", request), _message("assistant", answer)]


def _message(speaker: str, content: Any) -> Message:
    if speaker not in ROLES:
        raise ValueError(f"wrong roles: unknown {speaker!r}")
    return {"role": ROLES[speaker], "content": _text(content)}


def _text(content: Any) -> str:
    """Content as one string: joins a list of text parts; None is empty."""
    if isinstance(content, list):
        return "".join(
            _text(part.get("text", part.get("value")) if part.get("type", "text") == "text" else part)
            for part in content
        )
    if content is not None and not isinstance(content, str):
        raise ValueError(f"wrong shape: expected text, got {content!r:.60}")
    return content or ""
