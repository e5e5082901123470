"""Intervals and tests for accuracies and their differences, where questions about one thing are not independent.

Every figure that comes with an interval is a pair ``(figure, (low, high))`` at 95%.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

Interval = tuple[float, float]
Values = Sequence[float] | np.ndarray
Groups = Sequence[str] | np.ndarray

DRAWS = 2000


def bootstrap_mean(values: Values, groups: Groups, draws: int = DRAWS, seed: int = 0) -> tuple[float, Interval]:
    """Mean of a figure with its 95% interval, by the percentile bootstrap over groups.

    For a paired difference, give the differences question by question.

    Args:
        values: One figure a question.
        groups: What each question is about; whole groups are drawn, since their questions stand or fall together.
        draws: Number of resamples.
        seed: Of the resamples.
    """
    return bootstrap_average([(values, groups)], draws, seed)


def bootstrap_average(
    tasks: Sequence[tuple[Values, Groups]], draws: int = DRAWS, seed: int = 0
) -> tuple[float, Interval]:
    """Mean of the means of several tasks, each resampled for itself; see :func:`bootstrap_mean`."""
    means = np.mean(
        [_resampled_means(values, groups, draws, seed + i) for i, (values, groups) in enumerate(tasks)], axis=0
    )
    return float(np.mean([np.mean(values) for values, _ in tasks])), _percentiles(means)


def bootstrap_ratio(
    part: Values, whole: Values, groups: Groups, draws: int = DRAWS, seed: int = 0
) -> tuple[float, Interval]:
    """Mean of one figure as a share of the mean of another, both of the same questions; see :func:`bootstrap_mean`.

    The interval says little unless that of ``whole`` is well away from zero.
    """
    parts, wholes = (_resampled_means(values, groups, draws, seed) for values in (part, whole))
    return float(np.mean(part) / np.mean(whole)), _percentiles(parts[wholes != 0] / wholes[wholes != 0])


def accuracy(scores: Values, groups: Groups) -> tuple[float, Interval]:
    """Mean score with its 95% interval.

    Wilson's interval where questions are independent and simply right or wrong. The bootstrap otherwise; but where all questions
    are right, or all wrong, it has no width, and Wilson's over groups is taken: so many independent things were asked about.

    Args:
        scores: One a question, 0 to 1.
        groups: What each is about.
    """
    scores, number = np.asarray(scores, dtype=float), len(np.unique(groups))
    mean, alike = float(scores.mean()), bool((scores == scores[0]).all())
    if np.isin(scores, (0, 1)).all() and (number == len(scores) or alike):
        return mean, wilson(round(mean * number), number)
    return bootstrap_mean(scores, groups)


def wilson(right: int, number: int) -> Interval:
    """Wilson's 95% score interval of a proportion (Wilson 1927, without continuity correction)."""
    from scipy.stats import binomtest

    interval = binomtest(right, number).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(helped: int, hurt: int) -> float:
    """McNemar's exact test (1947): how likely so uneven a split of the questions on which two methods differ is by chance.

    Questions count as independent of each other. 1 where the methods differ nowhere.

    Args:
        helped: Questions that only the one has right.
        hurt: Questions that only the other has right.
    """
    from scipy.stats import binomtest

    return float(binomtest(helped, helped + hurt).pvalue) if helped + hurt else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests at once, adjusted by Holm's method (1979): below 0.05 once in twenty families with no effect at all."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted.tolist()


def _resampled_means(values: Values, groups: Groups, draws: int, seed: int) -> np.ndarray:
    """``(draws,)``: the mean over questions of as many groups as there are, drawn with replacement."""
    _, which = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(which, weights=np.asarray(values, dtype=float)), np.bincount(which)
    times = _times_drawn(len(counts), draws, seed)
    return (times @ sums) / (times @ counts)


@lru_cache(maxsize=4)  # every figure of a task resamples the same groups, and drawing takes longer than the rest
def _times_drawn(number: int, draws: int, seed: int) -> np.ndarray:
    """``(draws, number)``: how often each of so many groups is in each resample."""
    drawn = np.random.default_rng(seed).integers(0, number, (draws, number))
    times = np.empty((draws, number))
    for row, groups in zip(times, drawn, strict=True):
        row[:] = np.bincount(groups, minlength=number)
    return times


def _percentiles(drawn: np.ndarray) -> Interval:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
