import re

import pytest
from answers import answers, run_of

from kvfuse.evaluation.report.verdict import points
from kvfuse.evaluation.scoring.metrics import metrics
from kvfuse.evaluation.scoring.statistics import MIN_ITEMS


def verdict_of(**scores):
    """The verdict, without intervals, on methods that answer some of 100 items correctly.

    A method is given the number of its correct items, the first ones, or the items themselves.
    """
    rows = []
    for name, score in scores.items():
        right = range(score) if isinstance(score, int) else score
        rows.append(
            answers(
                name.replace("_", "-"),
                [float(i in right) for i in range(100)],
                seed=None if name in ("receiver", "sharer") else 0,
            )
        )
    return re.sub(r"\[.*?\]", "[]", metrics(run_of(*rows))["tasks"]["t"]["verdict"])


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (
            {"mismatched": 30},
            "The gain over the receiver is 30.0 [] points; all of it needs the sharer to have read this question",
        ),
        ({"mismatched": 50}, "10.0 [] of it (33%) needs the sharer to have read this question."),
        (
            {"mismatched": 59},
            "no part of it can be shown to need the sharer to have read this question (+1.0 [] points).",
        ),
        ({"mismatched": 80}, "none of it needs the sharer to have read this question"),
        ({}, "which part of it is communication is unknown, since there is no mismatched control."),
    ],
)
def test_a_gain_is_split_by_what_needed_this_question(scores, said):
    assert said in verdict_of(receiver=30, cache_to_cache=60, **scores)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({"mismatched": 5}, "this question's cache is worth +15.0 [] points against another's."),
        ({"mismatched": 20}, "Nor can it be shown that it matters which question the sharer read: +0.0 [] points."),
        ({"mismatched": 40}, "This question's cache does worse than another's: -20.0 [] points."),
        ({}, "There is no mismatched control."),
    ],
)
@pytest.mark.parametrize(
    ("receiver", "first"),
    [
        (30, "Fusing loses 10.0 [] points against the receiver alone. "),
        (range(1, 21), "No gain over the receiver can be shown: +0.0 []"),
    ],
    ids=["loss", "no gain"],
)
def test_without_a_gain_the_content_is_told_by_itself(receiver, first, scores, said):
    verdict = verdict_of(receiver=receiver, cache_to_cache=20, **scores)
    assert verdict.startswith(first)
    assert said in verdict


def test_no_verdict_without_both():
    assert verdict_of(receiver=30, mismatched=30).startswith("No verdict")
    assert verdict_of(sharer=30, cache_to_cache=30).startswith("No verdict")


def test_the_rest_is_said_where_it_is_known():
    plain = verdict_of(receiver=30, cache_to_cache=60)
    assert "seeds" not in plain
    assert "letters" not in plain
    assert "Fused, it keeps 100.0 []% of what the receiver alone has right." in plain
    assert "the sharer alone has right." in verdict_of(receiver=30, sharer=40, cache_to_cache=60)
    assert "removed, the difference is +5.0 [] points." in verdict_of(receiver=30, calibrated=55, cache_to_cache=60)


@pytest.mark.parametrize("number", [MIN_ITEMS - 1, MIN_ITEMS])
def test_no_verdict_from_a_few_items(number):
    run = run_of(answers("receiver", [0] * number), answers("cache-to-cache", [1] * number, seed=0))
    verdict = metrics(run)["tasks"]["t"]["verdict"]
    few = verdict.startswith("No verdict from 19 items, which takes 20: +100.0 [+100.0, +100.0] points")
    assert few == (number < MIN_ITEMS)
    assert few != verdict.startswith("The gain over the receiver is 100.0")


def test_the_range_of_seeds_is_told():
    rows = [answers("cache-to-cache", [1] * right + [0] * (10 - right), seed=right) for right in (6, 7, 9)]
    assert (
        "3 fuser seeds lie between 60.0 and 90.0."
        in metrics(run_of(answers("receiver", [0] * 10), *rows))["tasks"]["t"]["verdict"]
    )


def test_points_have_no_negative_zero():
    assert points(-1e-9, (-0.02, -1e-9)) == "0.0 [-2.0, 0.0]"
