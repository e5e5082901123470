"""The held-out questions of the embedded pair as a task of the harness (``kvfuse/evaluation/tasks/embedded_generate.yaml``)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvfuse.demo.pair_folder import PairFolder
from kvfuse.demo.score import held_out
from kvfuse.evaluation.tasks.sources import as_dataset

if TYPE_CHECKING:
    from datasets import DatasetDict


def load(only: str | Sequence[str] | None = None, limit: int | None = None, **_: Any) -> "DatasetDict":
    """Questions with their answer, their kind, and as ``group`` their place, as the harness asks a ``custom_dataset`` for them.

    Args:
        only: Kinds to keep, e.g. ``compound``.
        limit: At most so many of all kinds, spread evenly over kinds and places.

    Raises:
        EvaluationError: None is of these kinds.
    """
    kinds = {only} if isinstance(only, str) else set(only or ())
    asked = (one for one in held_out(PairFolder(), limit) if not kinds or one.kind in kinds)
    return as_dataset(
        ({"question": one.text, "answer": one.answer, "kind": one.kind, "group": one.place} for one in asked),
        "the embedded pair",
    )
