"""From a model's replies to right or wrong: the functions that the tasks' YAML refers to."""

from collections.abc import Sequence
from typing import Any

from kvfuse.evaluation.scoring.extraction import extract_option, strip_thoughts
from kvfuse.evaluation.scoring.results import equal_numbers, extract_number, extract_result, same_answer, same_result
from kvfuse.prompts.multiple_choice import ANSWER_STEM

NO_SCORE = -1e9
"""The log-likelihood of an option that could not be scored: lower than any, and still a number in JSON."""

Document = dict[str, Any]


def options(doc: Document) -> list[str]:
    """Returns the sentence that the prompt asks for, once per letter, up to the letter.

    The options differ in their last token only, so that comparing sentences compares letters.
    """
    return [f"{ANSWER_STEM} {letter}" for letter in doc["letters"]]


def target(doc: Document) -> str:
    """Returns the right sentence."""
    return f"{options(doc)[doc['answer']]}."


def letters(replies: Sequence[Sequence[str]], docs: Sequence[Document]) -> list[list[str]]:
    """Returns the letters that replies settle on; empty for none."""
    return [
        [extract_option(reply, doc["letters"], doc["choices"]) or "" for reply in of_doc]
        for of_doc, doc in zip(replies, docs, strict=True)
    ]


def numbers(replies: Sequence[Sequence[str]], docs: Sequence[Document]) -> list[list[str]]:
    """Returns the numbers that replies end in; empty for none."""
    return [[extract_number(reply) or "" for reply in of_doc] for of_doc in replies]


def formulas(replies: Sequence[Sequence[str]], docs: Sequence[Document]) -> list[list[str]]:
    """Returns the formulas that replies end in; empty for none."""
    return [[extract_result(reply) or "" for reply in of_doc] for of_doc in replies]


def texts(replies: Sequence[Sequence[str]], docs: Sequence[Document]) -> list[list[str]]:
    """Returns the replies without thoughts."""
    return [[strip_thoughts(reply) for reply in of_doc] for of_doc in replies]


def same_letter(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Returns whether the letter is right (``acc``), and whether there is one (``answered``)."""
    return _graded(results[0] == doc["letters"][doc["answer"]], results)


def same_text(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Returns whether the reply is the answer, by :func:`same_answer`."""
    return _graded(same_answer(results[0], doc["answer"]), results)


def same_number(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Returns whether the number is the answer's."""
    right = extract_number(doc["answer"])
    return _graded(bool(results[0] and right and equal_numbers(results[0], right)), results)


def same_formula(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Returns whether the formula equals the answer."""
    return _graded(bool(results[0]) and same_result(results[0], doc["answer"]), results)


def likeliest(doc: Document, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Returns whether the right option is the likeliest, and whether the options could be scored."""
    scores = [score for score, _ in results]
    scored = min(scores) > NO_SCORE  # a question fails with all of its options
    return {"acc": float(scored and scores.index(max(scores)) == doc["answer"]), "answered": float(scored)}


def likeliest_text(doc: Document, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Returns the same of log-likelihoods per character of the options' texts, and of their sums as ``acc_sum``."""
    scores = [score for score, _ in results]
    scored = min(scores) > NO_SCORE
    by_character = [score / max(len(text), 1) for score, text in zip(scores, doc["choices"], strict=True)]
    right = {"acc": by_character, "acc_sum": scores}
    graded = {name: float(scored and values.index(max(values)) == doc["answer"]) for name, values in right.items()}
    return {**graded, "answered": float(scored)}


def _graded(right: bool, results: Sequence[str]) -> dict[str, float]:
    return {"acc": float(right), "answered": float(bool(results[0]))}
