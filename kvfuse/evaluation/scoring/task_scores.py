"""The scores of one task as arrays: methods by seeds by items."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvfuse.evaluation.predictions import Prediction


@dataclass(frozen=True)
class TaskScores:
    """All scores of one task.

    Attributes:
        rows: Its predictions, of all methods.
    """

    rows: Sequence[Prediction]

    @cached_property
    def items(self) -> dict[str, Prediction]:
        """Each item's first prediction, in the order they were answered: for what does not depend on the method."""
        first: dict[str, Prediction] = {}
        for row in self.rows:
            first.setdefault(row.item, row)
        return first

    @cached_property
    def groups(self) -> np.ndarray:
        """``(items,)`` str: what each item is about; where that is not known, or the same for all, every item is its own group."""
        known = [row.group for row in self.items.values()]
        alone = len(set(known)) == 1
        return np.array([f"item {i}" if alone or group is None else f"group {group}" for i, group in enumerate(known)])

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """By method ``(seeds, items)`` float, NaN where there is no answer yet."""
        place = {item: i for i, item in enumerate(self.items)}
        scores = {name: np.full((len(seeds), len(place)), np.nan) for name, seeds in self.seeds.items()}
        for row in self.rows:
            scores[row.method][self.seeds[row.method].index(row.seed), place[row.item]] = row.score
        return scores

    @cached_property
    def seeds(self) -> dict[str, list[int | None]]:
        """By method, in order; ``[None]`` without a fuser."""
        seeds: dict[str, set[int | None]] = {}
        for row in self.rows:
            seeds.setdefault(row.method, set()).add(row.seed)
        return {name: sorted(one, key=lambda seed: (seed is not None, seed)) for name, one in seeds.items()}

    def answered(self, *methods: str) -> np.ndarray:
        """``(items,)`` bool: items that all of these have answered, with every seed."""
        return ~np.isnan(np.concatenate([self.scores[name] for name in methods])).any(axis=0)

    def mean(self, method: str) -> np.ndarray:
        """``(items,)``: an item's score, averaged over seeds."""
        return self.scores[method].mean(axis=0)

    def stacked_layers(self, method: str, other: str) -> tuple[np.ndarray, np.ndarray]:
        """Both methods' scores, ``(n, items)``: seed by seed where they have the same, else each seed of one with each of the other."""
        mine, theirs = self.scores[method], self.scores[other]
        if self.seeds[method] == self.seeds[other]:
            return mine, theirs
        return mine.repeat(len(theirs), axis=0), np.tile(theirs, (len(mine), 1))


def by_task(predictions: Sequence[Prediction]) -> dict[str, TaskScores]:
    """The scores of each task, in the order of the predictions."""
    rows: dict[str, list[Prediction]] = {}
    for row in predictions:
        rows.setdefault(row.task, []).append(row)
    return {name: TaskScores(some) for name, some in rows.items()}
