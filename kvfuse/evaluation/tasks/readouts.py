"""From a model's replies to what is right: the functions that the tasks' YAML names."""

from collections.abc import Sequence
from typing import Any

from kvfuse.evaluation.harness.adapter import NO_SCORE
from kvfuse.evaluation.scoring.extraction import extract_option, strip_thoughts
from kvfuse.evaluation.scoring.results import extract_number, extract_result, same_result
from kvfuse.prompts.chat import Prompt, as_chat

Document = dict[str, Any]


def options(doc: Document) -> list[str]:
    """What may follow a question: the sentence that its prompt asks for, once per letter, up to the letter.

    The options differ in their last token alone, so that comparing sentences compares letters.
    """
    return [f"The correct answer is {letter}" for letter in doc["letters"]]


def without_choices(prompt: Prompt) -> Prompt:
    """A multiple-choice prompt of these tasks without its options, and any other prompt as it is."""
    *before, last = as_chat(prompt)
    question = str(last["content"]).partition("\n\nChoices:\n")[0]
    return [*before, {**last, "content": question.removeprefix("Question: ")}]


def letters(replies: Sequence[Sequence[str]], docs: Sequence[Document]) -> list[list[str]]:
    """The letters that replies settle on; empty where that is none."""
    return [
        [extract_option(one, doc["letters"], doc["choices"]) or "" for one in some]
        for some, doc in zip(replies, docs, strict=True)
    ]


def numbers(replies: Sequence[Sequence[str]], docs: Sequence[Document]) -> list[list[str]]:
    """The numbers that replies end in."""
    return [[extract_number(one) or "" for one in some] for some in replies]


def formulas(replies: Sequence[Sequence[str]], docs: Sequence[Document]) -> list[list[str]]:
    """The formulas that replies end in."""
    return [[extract_result(one) or "" for one in some] for some in replies]


def texts(replies: Sequence[Sequence[str]], docs: Sequence[Document]) -> list[list[str]]:
    """The replies, thoughts left out."""
    return [[strip_thoughts(one) for one in some] for some in replies]


def same_letter(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Whether the letter is the right one, and whether there was one."""
    return _judged(results[0] == doc["letters"][doc["answer"]], results)


def same_text(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Whether the reply is the answer, letter by letter."""
    return _judged(results[0] == doc["answer"], results)


def same_number(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Whether the number is the answer's."""
    return _judged(bool(results[0]) and results[0] == extract_number(doc["answer"]), results)


def same_formula(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Whether the formula says what the answer says."""
    return _judged(bool(results[0]) and same_result(results[0], doc["answer"]), results)


def likeliest(doc: Document, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Whether the right option is the likeliest, and whether the options could be scored."""
    scores = [score for score, _ in results]
    scored = min(scores) > NO_SCORE
    return {"acc": float(scored and scores.index(max(scores)) == doc["answer"]), "answered": float(scored)}


def _judged(right: bool, results: Sequence[str]) -> dict[str, float]:
    return {"acc": float(right), "answered": float(bool(results[0]))}
