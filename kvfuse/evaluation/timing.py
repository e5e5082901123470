"""Latency beside accuracy: single questions, warm, methods by turns, so that drift hits all alike."""

from collections.abc import Iterator, Sequence
from typing import Any

from kvfuse.evaluation.predictions import Timing
from kvfuse.methods import Method
from kvfuse.prompts.chat import Prompt


def time_methods(
    methods: Sequence[Method], task: str, questions: Sequence[tuple[str, Prompt, dict[str, Any]]], wanted: int
) -> Iterator[list[Timing]]:
    """Ask some of a task's questions one at a time, spread evenly over all of them.

    Args:
        methods: Who answers; each is told all questions first (:meth:`Method.prepare`).
        task: Its name.
        questions: Id, prompt and options of ``generate`` (:func:`kvfuse.evaluation.asking.prompts_of`).
        wanted: At most so many.

    Yields:
        For each question a line per method; methods that cannot answer it have none.
    """
    if not questions or wanted < 1:
        return
    for method in methods:
        method.prepare([prompt for _, prompt, _ in questions], **questions[0][2])
    asked = questions[:: -(-len(questions) // wanted)]
    for method in methods:  # the first is a warm-up
        _time(method, task, *asked[0])
    for one in asked:
        yield [timing for method in methods if (timing := _time(method, task, *one)) is not None]


def _time(method: Method, task: str, item: str, prompt: Prompt, options: dict[str, Any]) -> Timing | None:
    try:
        answer = method.timed(prompt, **options)
    except Exception:  # it is counted where the question is scored
        return None
    return Timing(
        task=task,
        item=item,
        method=method.name,
        seconds=answer.seconds,
        tokens_in=answer.tokens_in,
        tokens=answer.tokens,
        phases=answer.phases,
    )
