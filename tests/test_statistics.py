import numpy as np
import pytest

from kvfuse.evaluation.statistics import bootstrap_mean


def test_interval_agrees_with_the_normal_approximation():
    values = np.random.default_rng(1).random(400) < 0.7
    mean, (low, high) = bootstrap_mean(values, [str(i) for i in range(400)], draws=4000)
    half = 1.96 * values.std() / 20
    assert mean == values.mean()
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.006)


def test_questions_about_one_thing_count_once():
    """Ten copies of each answer say nothing new: the interval stays that of the single answers."""
    single = np.random.default_rng(2).random(100)
    alone = bootstrap_mean(single, [str(i) for i in range(100)])
    copied = bootstrap_mean(single.repeat(10), [str(i) for i in range(100) for _ in range(10)])
    assert copied[0] == pytest.approx(alone[0])
    assert copied[1] == pytest.approx(alone[1])


def test_a_constant_has_no_width():
    assert bootstrap_mean([0.5] * 8, list("abcdabcd")) == (0.5, (0.5, 0.5))


def test_groups_of_unlike_size_keep_the_mean_over_questions():
    mean, (low, high) = bootstrap_mean([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert mean == 0.75
    assert (low, high) == (0.0, 1.0)
