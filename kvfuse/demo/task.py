"""The embedded pair's held-out questions as a task of the harness (``evaluation/tasks/embedded_generate.yaml``)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvfuse.demo.pair_folder import PairFolder
from kvfuse.demo.score import held_out
from kvfuse.evaluation.tasks.sources import as_dataset

if TYPE_CHECKING:
    from datasets import DatasetDict


def load(only: str | Sequence[str] | None = None, limit: int | None = None, **_: Any) -> "DatasetDict":
    """Returns questions with answer, kind and place (as ``group``): the harness's ``custom_dataset``.

    Args:
        only: Kinds to keep, e.g. ``compound``.
        limit: Number of questions of all kinds, spread evenly over kinds and places.

    Raises:
        EvaluationError: There are no questions of these kinds.
    """
    # the limit counts questions of all kinds, as in the demo
    kinds = {only} if isinstance(only, str) else set(only or ())
    items = (
        {"question": question.text, "answer": question.answer, "kind": question.kind, "group": question.place}
        for question in held_out(PairFolder(), limit)
        if not kinds or question.kind in kinds
    )
    return as_dataset(items, "the embedded pair")
