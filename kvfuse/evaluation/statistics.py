"""Intervals for accuracies and their differences, where questions about one thing are not independent."""

from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]


def bootstrap_mean(values: Sequence[float] | np.ndarray, groups: Sequence[str], draws: int = 2000, seed: int = 0) -> tuple[float, Interval]:
    """Mean of a figure with its 95% interval, by the percentile bootstrap over groups.

    For a paired difference, give the differences question by question.

    Args:
        values: One figure a question.
        groups: What each question is about; whole groups are drawn, since their questions stand or fall together.
        draws: Number of resamples.
        seed: Of the resamples.
    """
    values = np.asarray(values, dtype=float)
    _, which = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(which, weights=values), np.bincount(which)
    drawn = np.random.default_rng(seed).integers(0, len(counts), (draws, len(counts)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), (float(low), float(high))
