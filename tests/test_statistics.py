import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from kvfuse.evaluation.scoring.statistics import (
    accuracy,
    bootstrap_average,
    bootstrap_mean,
    bootstrap_ratio,
    holm,
    mcnemar,
    wilson,
)


def each(number):
    return [str(i) for i in range(number)]


def test_interval_agrees_with_the_normal_approximation():
    values = np.random.default_rng(1).random(400) < 0.7
    mean, (low, high) = bootstrap_mean(values, each(400), draws=4000)
    half = 1.96 * values.std() / 20
    assert mean == values.mean()
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.006)


def test_interval_agrees_with_scipy():
    values = np.random.default_rng(3).beta(0.5, 1.5, 150)  # skewed: the two ends are not alike
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=0).confidence_interval
    assert bootstrap_mean(values, each(150), draws=9999)[1] == pytest.approx(tuple(theirs), abs=0.003)


def test_interval_of_a_paired_difference_agrees_with_scipy():
    rng = np.random.default_rng(4)
    one = rng.random(200) < 0.6
    other = np.where(rng.random(200) < 0.8, one, rng.random(200) < 0.5)
    theirs = scipy.stats.bootstrap(
        (one, other),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        n_resamples=9999,
        method="percentile",
        rng=0,
    ).confidence_interval
    ours = bootstrap_mean(one.astype(float) - other, each(200), draws=9999)
    assert ours[0] == pytest.approx(one.mean() - other.mean())
    assert ours[1] == pytest.approx(tuple(theirs), abs=0.006)


def test_interval_of_a_ratio_agrees_with_scipy():
    rng = np.random.default_rng(5)
    whole = rng.normal(0.5, 0.4, 150)
    part = 0.4 * whole + rng.normal(0, 0.2, 150)
    theirs = scipy.stats.bootstrap(
        (part, whole),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        n_resamples=9999,
        method="percentile",
        rng=0,
    ).confidence_interval
    ratio, interval = bootstrap_ratio(part=part, whole=whole, groups=each(150), draws=9999)
    assert ratio == pytest.approx(part.mean() / whole.mean())
    assert interval == pytest.approx(tuple(theirs), abs=0.01)


def test_a_ratio_survives_resamples_without_a_whole():
    ratio, interval = bootstrap_ratio(part=[1, 0, 0, 0], whole=[1, 0, 0, 1], groups=each(4))
    assert ratio == 0.5
    assert np.isfinite(interval).all()


def test_questions_about_one_thing_count_once():
    """Ten copies of each answer say nothing new: the interval stays that of the single answers."""
    single = np.random.default_rng(2).random(100)
    alone = bootstrap_mean(single, each(100))
    copied = bootstrap_mean(single.repeat(10), [str(i) for i in range(100) for _ in range(10)])
    assert copied[0] == pytest.approx(alone[0])
    assert copied[1] == pytest.approx(alone[1])


def test_a_constant_has_no_width():
    assert bootstrap_mean([0.5] * 8, list("abcdabcd")) == (0.5, (0.5, 0.5))


def test_groups_of_unlike_size_keep_the_mean_over_questions():
    mean, (low, high) = bootstrap_mean([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert mean == 0.75
    assert (low, high) == (0.0, 1.0)


def test_an_average_over_tasks_is_of_means_and_as_wide_as_their_variances_say():
    rng = np.random.default_rng(6)
    tasks = [(rng.random(number), each(number)) for number in (50, 400)]
    mean, (low, high) = bootstrap_average(tasks, draws=9999)
    deviation = sum(values.var() / len(values) for values, _ in tasks) ** 0.5 / 2
    assert mean == pytest.approx((tasks[0][0].mean() + tasks[1][0].mean()) / 2)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.05)


@pytest.mark.parametrize(("right", "number"), [(0, 7), (3, 10), (10, 10), (4700, 5632)])
def test_wilson_agrees_with_statsmodels(right, number):
    assert wilson(right, number) == pytest.approx(proportion_confint(right, number, method="wilson"))


@pytest.mark.parametrize(("helped", "hurt"), [(0, 0), (5, 0), (12, 30), (31, 12), (8, 8), (700, 520)])
def test_mcnemar_agrees_with_statsmodels(helped, hurt):
    theirs = their_mcnemar([[100, hurt], [helped, 50]], exact=True).pvalue if helped + hurt else 1.0
    assert mcnemar(helped, hurt) == pytest.approx(min(theirs, 1))


@pytest.mark.parametrize("p_values", [[0.01, 0.04, 0.03, 0.005], [0.5, 0.9, 0.2], [0.02, 0.02], [1.0], []])
def test_holm_agrees_with_statsmodels(p_values):
    theirs = multipletests(p_values, method="holm")[1].tolist() if p_values else []
    assert holm(p_values) == pytest.approx(theirs)


def test_accuracy_of_independent_questions_is_wilsons():
    assert accuracy([1, 0, 1, 1], each(4)) == (0.75, wilson(3, 4))


def test_accuracy_of_questions_in_groups_or_with_grades_is_the_bootstraps():
    scores, groups = [1.0, 1.0, 0.0, 1.0], list("aabb")
    assert accuracy(scores, groups) == bootstrap_mean(scores, groups)
    assert accuracy([0.2, 0.7], each(2)) == bootstrap_mean([0.2, 0.7], each(2))


@pytest.mark.parametrize("score", [0, 1])
def test_where_all_is_right_the_interval_says_how_much_was_asked(score):
    """The bootstrap would say: certain. Six questions about two things are no more than two."""
    assert accuracy([score] * 6, list("aaabbb")) == (score, wilson(2 * score, 2))
