"""The scores of one task as arrays of methods, seeds and items."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvfuse.evaluation.predictions import Prediction

RIGHT = 0.5
"""An item counts as right from this score on, where figures need a yes or no: helped, hurt, kept, overlap."""


@dataclass(frozen=True)
class TaskScores:
    """All scores of one task.

    Attributes:
        rows: The task's predictions, of all methods.
    """

    rows: Sequence[Prediction]

    @cached_property
    def items(self) -> dict[str, Prediction]:
        """Each item's first prediction, in the order of the rows, for fields that are the same for all methods."""
        first: dict[str, Prediction] = {}
        for row in self.rows:
            first.setdefault(row.item, row)
        return first

    @cached_property
    def groups(self) -> np.ndarray:
        """``(items,)`` str: the topic of each item; an item of unknown topic is its own group.

        So is every item where all share one topic, since one group cannot be resampled.
        """
        known = [row.group for row in self.items.values()]
        # prefixes keep a group's name from being taken for an item's
        single = len(set(known)) == 1
        return np.array([f"item {i}" if single or group is None else f"group {group}" for i, group in enumerate(known)])

    @cached_property
    def categories(self) -> np.ndarray:
        """``(items,)`` str: the category of each item."""
        return np.array([str(row.category) for row in self.items.values()])

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """By method ``(seeds, items)`` float, NaN where there is no answer yet."""
        column = {item: i for i, item in enumerate(self.items)}
        # lines may come in any order, as from a run that was continued
        scores = {name: np.full((len(seeds), len(column)), np.nan) for name, seeds in self.seeds.items()}
        for row in self.rows:
            scores[row.method][self.seeds[row.method].index(row.seed), column[row.item]] = row.score
        return scores

    @cached_property
    def seeds(self) -> dict[str, list[int | None]]:
        """By method, in order; ``[None]`` without a fuser."""
        seeds: dict[str, set[int | None]] = {}
        for row in self.rows:
            seeds.setdefault(row.method, set()).add(row.seed)
        return {name: sorted(found, key=lambda seed: (seed is not None, seed)) for name, found in seeds.items()}

    def answered(self, *methods: str) -> np.ndarray:
        """``(items,)`` bool: items that all of these methods have answered, with every seed."""
        return ~np.isnan(np.concatenate([self.scores[name] for name in methods])).any(axis=0)

    def mean(self, method: str) -> np.ndarray:
        """``(items,)``: an item's score, averaged over seeds."""
        return self.scores[method].mean(axis=0)

    def gain(self, method: str, *, over: str) -> np.ndarray:
        """``(items,)``: an item's score by a method, less that by another one."""
        return self.mean(method) - self.mean(over)

    def pair_seeds(self, method: str, other: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns both methods' scores, ``(n, items)``, seed by seed.

        Where the seeds differ, each seed of one method is paired with each seed of the other.
        """
        first, second = self.scores[method], self.scores[other]
        if self.seeds[method] == self.seeds[other]:
            return first, second
        return first.repeat(len(second), axis=0), np.tile(second, (len(first), 1))


def by_task(predictions: Sequence[Prediction]) -> dict[str, TaskScores]:
    """Returns the scores of each task, in the order of the predictions."""
    rows: dict[str, list[Prediction]] = {}
    for row in predictions:
        rows.setdefault(row.task, []).append(row)
    return {name: TaskScores(task_rows) for name, task_rows in rows.items()}
