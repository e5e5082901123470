"""One evaluator for everything that asks methods questions: batching, grading and timing.

The demo and the analyses call it directly, ``kvfuse eval`` through lm-evaluation-harness
(:mod:`kvfuse.evaluation.harness`), so that their figures cannot differ but by their questions and settings.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kvfuse.evaluation.predictions import Prediction, Timing
from kvfuse.evaluation.scoring.results import same_answer
from kvfuse.methods import Answer, Method
from kvfuse.prompts.messages import Prompt

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
    lengths: Sequence[int], answer: Callable[[list[int]], Sequence[R]], batch_size: int
) -> Iterator[tuple[int, R | Exception]]:
    """Answers items in batches of similar length, so that there is little padding.

    The longest come first: items that do not fit into memory fail at the start. A batch that fails is answered again
    item by item, so that one item cannot spoil the others.

    Args:
        lengths: Of the items, in any unit.
        answer: Returns the results of the items with the given indices.
        batch_size: Number of items per batch.

    Yields:
        The index of each item with its result, or with the error that it raised when answered alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        results: list[tuple[int, R | Exception]]
        try:
            results = list(zip(batch, answer(batch), strict=True))
        except Exception:  # of whatever kind: it concerns this batch only
            results = [(index, _answer_alone(index, answer)) for index in batch]
        yield from results


def answer_all(
    lengths: Sequence[int],
    answer: Callable[[list[int]], Sequence[R]],
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[R]:
    """Returns the results of all items in their order; arguments as of :func:`in_batches`.

    Args:
        progress: Called with the number of items that were just answered.

    Raises:
        Exception: The error of an item that fails alone, too.
    """
    results: dict[int, R] = {}
    for index, result in in_batches(lengths, answer, batch_size):
        if isinstance(result, Exception):
            raise result
        results[index] = result
        progress(1)
    return [results[index] for index in range(len(lengths))]


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
    # 1) ask
    prompts = [question.prompt for question in questions]
    method.prepare(prompts, **options)

    def answer(indices: list[int]) -> list[Answer]:
        return method.generate([prompts[index] for index in indices], **options)

    answers = answer_all(prompt_lengths(prompts), answer, batch_size, progress)
    # 2) grade
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
    # 1) prepare and warm up
    for method in methods:
        method.prepare([prompt for _, prompt, _ in questions], **questions[0][2])
    chosen = questions[:: -(-len(questions) // limit)]
    for method in methods:
        _time(method, task, *chosen[0])
    # 2) measure in turns: question by question, all methods
    timings = [_time(method, task, *question) for question in chosen for method in methods]
    return [timing for timing in timings if timing is not None]


def prompt_lengths(prompts: Sequence[Prompt]) -> list[int]:
    """Returns the prompts' numbers of characters, which are the same for all models."""
    return [len(str(prompt)) for prompt in prompts]


def question_text(prompt: Prompt) -> str:
    """Returns the text of a prompt, or of the last message of a chat."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _answer_alone(index: int, answer: Callable[[list[int]], Sequence[R]]) -> R | Exception:
    try:
        return answer([index])[0]
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
