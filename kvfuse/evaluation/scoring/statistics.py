"""Intervals and tests for accuracies and their differences, where questions about one topic are not independent.

Every figure with an interval is a pair ``(figure, (low, high))`` at 95%.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

Interval = tuple[float, float]
Values = Sequence[float] | np.ndarray
Groups = Sequence[str] | np.ndarray

NUM_RESAMPLES = 2000
PERCENTILES = (2.5, 97.5)
MIN_ITEMS = 20
"""Fewest items to draw a conclusion from: the percentile bootstrap's 95% intervals of fewer are clearly too narrow."""


def bootstrap_mean(values: Values, groups: Groups, draws: int = NUM_RESAMPLES, seed: int = 0) -> tuple[float, Interval]:
    """Returns the mean with its 95% interval, by the percentile bootstrap over groups.

    For a paired difference, give the differences question by question.

    Args:
        values: One figure per question.
        groups: The topic of each question. Whole groups are drawn, since their questions stand or fall together.
        draws: Number of resamples.
        seed: Of the resamples.
    """
    return bootstrap_average([(values, groups)], draws, seed)


def bootstrap_average(
    tasks: Sequence[tuple[Values, Groups]], draws: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, Interval]:
    """Returns the mean of the means of several tasks, each resampled separately; see :func:`bootstrap_mean`."""
    resampled = [_resampled_means(values, groups, draws, seed + i) for i, (values, groups) in enumerate(tasks)]
    return float(np.mean([np.mean(values) for values, _ in tasks])), _interval(np.mean(resampled, axis=0))


def bootstrap_ratio(
    *, part: Values, whole: Values, groups: Groups, draws: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, Interval]:
    """Returns the mean of ``part`` as a share of the mean of ``whole``, both of the same questions.

    The interval says little unless that of ``whole`` is well away from zero. See :func:`bootstrap_mean`.
    """
    parts, wholes = (_resampled_means(values, groups, draws, seed) for values in (part, whole))
    known = wholes != 0
    return float(np.mean(part) / np.mean(whole)), _interval(parts[known] / wholes[known])


def accuracy(scores: Values, groups: Groups) -> tuple[float, Interval]:
    """Returns the mean score with its 95% interval.

    It is Wilson's interval where questions are independent and right or wrong, else the bootstrap's. But where all
    questions are right, or all wrong, the bootstrap has no width, and Wilson's interval over groups is taken instead.

    Args:
        scores: One per question, 0 to 1.
        groups: The topic of each question.
    """
    scores, num_groups = np.asarray(scores, dtype=float), len(np.unique(groups))
    # a constant score of n groups is like n questions, of which all or none are right
    mean, constant = float(scores.mean()), bool((scores == scores[0]).all())
    if np.isin(scores, (0, 1)).all() and (num_groups == len(scores) or constant):
        return mean, wilson(round(mean * num_groups), num_groups)
    return bootstrap_mean(scores, groups)


def wilson(right: int, number: int) -> Interval:
    """Returns Wilson's 95% score interval of a proportion (Wilson 1927, without continuity correction)."""
    from scipy.stats import binomtest

    interval = binomtest(right, number).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(helped: int, hurt: int) -> float:
    """McNemar's exact test (1947): the probability of so uneven a split of the questions on which two methods differ.

    Questions count as independent. 1 where the methods differ nowhere.

    Args:
        helped: Number of questions that only the first method has right.
        hurt: Number of questions that only the second method has right.
    """
    from scipy.stats import binomtest

    return float(binomtest(helped, helped + hurt).pvalue) if helped + hurt else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values of several tests, adjusted to bound the family-wise error rate (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    # the smallest p-value is multiplied by the number of tests, the next by one less, ...
    scaled = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    # ... and none may be smaller than the one before
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted.tolist()


def _resampled_means(values: Values, groups: Groups, draws: int, seed: int) -> np.ndarray:
    """``(draws,)``: the mean over the questions of as many groups as there are, drawn with replacement."""
    # sums and sizes of groups suffice: a mean over questions is a ratio of their sums
    _, group_of = np.unique(np.asarray(groups), return_inverse=True)
    sums, sizes = np.bincount(group_of, weights=np.asarray(values, dtype=float)), np.bincount(group_of)
    counts = _draw_counts(len(sizes), draws, seed)
    return (counts @ sums) / (counts @ sizes)


@lru_cache(maxsize=4)  # all figures of a task resample the same groups, and drawing takes longer than the rest
def _draw_counts(num_groups: int, draws: int, seed: int) -> np.ndarray:
    """``(draws, num_groups)``: how often each group is in each resample."""
    drawn = np.random.default_rng(seed).integers(0, num_groups, (draws, num_groups))
    counts = np.empty((draws, num_groups))
    for row, groups in zip(counts, drawn, strict=True):
        row[:] = np.bincount(groups, minlength=num_groups)
    return counts


def _interval(resampled: np.ndarray) -> Interval:
    low, high = np.percentile(resampled, PERCENTILES)
    return float(low), float(high)
