"""One evaluator for everything that asks methods questions: batching, grading and timing.

The demo and the analyses call it directly, ``kvfuse eval`` through lm-evaluation-harness (:mod:`kvfuse.evaluation.harness`),
so that their figures cannot differ for any other reason than their questions and settings.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kvfuse.evaluation.predictions import Prediction, Timing
from kvfuse.evaluation.scoring.results import same_answer
from kvfuse.methods import Answer, Method
from kvfuse.prompts.chat import Prompt

T = TypeVar("T")
R = TypeVar("R")

TimedQuestion = tuple[str, Prompt, dict[str, Any]]
"""Id, prompt and options of ``generate``."""


@dataclass(frozen=True)
class Question:
    """A question with its right answer.

    Attributes:
        prompt: A text or a chat.
        answer: The right answer.
        category: Subject or kind.
        group: Its topic, where questions are not independent of each other.
    """

    prompt: Prompt
    answer: str
    category: str | None = None
    group: str | None = None


def in_batches(
    items: Sequence[T], answer: Callable[[Sequence[T]], Sequence[R]], batch_size: int, *, length: Callable[[T], int]
) -> Iterator[tuple[T, R | Exception]]:
    """Answers items in batches of similar length, so that there is little padding.

    The longest come first: what does not fit into memory is known at the start. A batch that fails is answered again item
    by item, so that one item cannot spoil the others.

    Args:
        items: What to answer.
        answer: Returns the results of a batch, in its order.
        batch_size: Number of items per batch.
        length: Sorts the items.

    Yields:
        Each item with its result, or with the error that it raised when answered alone.
    """
    ordered = sorted(items, key=length, reverse=True)
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        results: list[tuple[T, R | Exception]]
        try:
            results = list(zip(batch, answer(batch), strict=True))
        except Exception:  # of whatever kind: it concerns this batch only
            results = [(item, _answer_alone(item, answer)) for item in batch]
        yield from results


def answer_all(
    items: Sequence[T],
    answer: Callable[[Sequence[T]], Sequence[R]],
    batch_size: int,
    *,
    length: Callable[[T], int],
    progress: Callable[[int], None] = lambda done: None,
) -> list[R]:
    """Returns the results of all items in their order; arguments as of :func:`in_batches`.

    Args:
        progress: Called with the number of items that were just answered.

    Raises:
        Exception: Whatever an item raises that fails alone, too.
    """
    results: dict[int, R] = {}
    for index, result in in_batches(
        range(len(items)),
        lambda batch: answer([items[index] for index in batch]),
        batch_size,
        length=lambda index: length(items[index]),
    ):
        if isinstance(result, Exception):
            raise result
        results[index] = result
        progress(1)
    return [results[index] for index in range(len(items))]


def ask(
    method: Method,
    questions: Sequence[Question],
    batch_size: int,
    *,
    task: str,
    seed: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> list[Prediction]:
    """Have a method answer questions, and grade its answers by :func:`same_answer`.

    Args:
        method: Answers.
        questions: All of a run.
        batch_size: Number of questions per batch.
        task: Its name in the predictions.
        seed: Of the method's fuser, if it has one.
        progress: See :func:`answer_all`.
        options: Of transformers' ``generate``.
    """
    method.prepare([question.prompt for question in questions], **options)
    answers = answer_all(
        questions,
        lambda batch: method.generate([question.prompt for question in batch], **options),
        batch_size,
        length=lambda question: len(str(question.prompt)),
        progress=progress,
    )
    return [
        Prediction(
            task=task,
            item=str(index),
            method=method.name,
            seed=seed,
            prompt_hash="",
            answer=answer.text,
            extracted=answer.text,
            target=question.answer,
            question=question_text(question.prompt),
            score=float(same_answer(answer.text, question.answer)),
            category=question.category,
            group=question.group,
            **_cost(answer),
        )
        for index, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]


def time_methods(methods: Sequence[Method], task: str, questions: Sequence[TimedQuestion], limit: int) -> list[Timing]:
    """Measure the latency of single questions, spread evenly over all of them.

    The methods take turns, so that a drift of the machine affects all alike, after a warm-up question each.

    Args:
        methods: Which answer; all questions are prepared first (:meth:`Method.prepare`).
        task: Its name.
        questions: Of the task.
        limit: Number of questions at most.

    Returns:
        A line per question and method, question by question; none where a method cannot answer.
    """
    if not questions or limit < 1:
        return []
    for method in methods:
        method.prepare([prompt for _, prompt, _ in questions], **questions[0][2])
    chosen = questions[:: -(-len(questions) // limit)]
    for method in methods:  # warm-up
        _time(method, task, *chosen[0])
    timings = [_time(method, task, *question) for question in chosen for method in methods]
    return [timing for timing in timings if timing is not None]


def question_text(prompt: Prompt) -> str:
    """Returns the text of a prompt, or of the last message of a chat."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _answer_alone(item: T, answer: Callable[[Sequence[T]], Sequence[R]]) -> R | Exception:
    try:
        return answer([item])[0]
    except Exception as error:
        return error


def _time(method: Method, task: str, item: str, prompt: Prompt, options: dict[str, Any]) -> Timing | None:
    try:
        answer = method.timed(prompt, **options)
    except Exception:  # counted where the question is scored
        return None
    return Timing(task=task, item=item, method=method.name, phases=answer.phases, **_cost(answer))


def _cost(answer: Answer) -> dict[str, Any]:
    return {"seconds": answer.seconds, "tokens_in": answer.tokens_in, "tokens": answer.tokens}
