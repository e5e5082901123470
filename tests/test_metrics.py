import json

import numpy as np
import pytest
from answers import answers, run_of, timings

from kvfuse.evaluation.report.verdict import difference
from kvfuse.evaluation.scoring.metrics import metrics
from kvfuse.evaluation.scoring.statistics import bootstrap_mean, mcnemar, wilson

RECEIVER = [1, 1, 1, 0, 0, 0, 0, 0]
SHARER = [1, 0, 0, 1, 1, 0, 0, 0]
FUSED = [1, 1, 0, 1, 1, 1, 0, 0]


def figures_of(*some, **fields):
    return metrics(run_of(*some, **fields))["tasks"]["t"]


@pytest.fixture
def task():
    return figures_of(
        answers("receiver", RECEIVER), answers("sharer", SHARER), answers("cache-to-cache", FUSED, seed=0)
    )


def test_one_task_by_hand(task):
    fused = task["methods"]["cache-to-cache"]
    assert (fused["accuracy"], fused["interval"], fused["seeds"]) == (5 / 8, wilson(5, 8), {"0": 5 / 8})
    assert fused["kept"]["receiver"] == {"share": 2 / 3, "interval": wilson(2, 3), "items": 3}
    assert fused["kept"]["sharer"]["share"] == 1
    pair = difference(task, "cache-to-cache", "receiver")
    assert (pair["difference"], pair["helped"], pair["hurt"], pair["p"]) == (2 / 8, 3, 1, mcnemar(3, 1))
    assert pair["interval"] == bootstrap_mean(np.subtract(FUSED, RECEIVER), [str(i) for i in range(8)])[1]


def test_overlap_by_hand(task):
    assert task["overlap"]["regions"] == {
        "": 2,
        "receiver": 1,
        "sharer": 0,
        "cache-to-cache": 1,
        "receiver+sharer": 0,
        "receiver+cache-to-cache": 1,
        "sharer+cache-to-cache": 2,
        "receiver+sharer+cache-to-cache": 1,
    }


def test_a_pair_turned_around_is_the_same_pair(task):
    one, other = difference(task, "sharer", "receiver"), difference(task, "receiver", "sharer")
    assert (one["difference"], one["helped"], one["hurt"]) == (-other["difference"], other["hurt"], other["helped"])
    assert one["interval"] == (-other["interval"][1], -other["interval"][0])


def test_p_values_are_adjusted_over_all_pairs(task):
    least = min(pair["p"] for pair in task["pairs"])
    assert len(task["pairs"]) == 3
    assert min(pair["p_holm"] for pair in task["pairs"]) == pytest.approx(min(3 * least, 1))


def test_seeds_are_averaged_item_by_item():
    """As many seeds as there are, the interval is about items; helped minus hurt is the gain whatever the seeds."""
    task = figures_of(
        answers("receiver", [0, 0, 1, 1]), *(answers("cache-to-cache", [1, s, s, 1], seed=s) for s in (0, 1))
    )
    fused, pair = task["methods"]["cache-to-cache"], difference(task, "cache-to-cache", "receiver")
    assert (fused["accuracy"], fused["seeds"]) == (0.75, {"0": 0.5, "1": 1.0})
    assert fused["interval"] == bootstrap_mean([1, 0.5, 0.5, 1], list("abcd"))[1]
    assert (pair["helped"], pair["hurt"], pair["difference"]) == (1.5, 0.5, 0.25)


def test_seeds_are_compared_seed_by_seed():
    """Fused and mismatched of one seed agree on everything: nothing is helped or hurt, though seeds differ."""
    rows = [answers(name, [s, 1 - s], seed=s) for name in ("mismatched", "cache-to-cache") for s in (0, 1)]
    pair = difference(figures_of(*rows), "cache-to-cache", "mismatched")
    assert (pair["helped"], pair["hurt"]) == (0, 0)
    assert difference(figures_of(*rows[::-1]), "cache-to-cache", "mismatched")["helped"] == 0
    crossed = difference(
        figures_of(rows[1], rows[0], *rows[2:]), "cache-to-cache", "mismatched"
    )  # a run on two machines
    assert (crossed["helped"], crossed["hurt"]) == (0, 0)
    unlike = [answers("mismatched", [s, 1 - s], seed=s + 5) for s in (0, 1)] + rows[2:]
    pair = difference(figures_of(*unlike), "cache-to-cache", "mismatched")
    assert (pair["helped"], pair["hurt"]) == (0.5, 0.5)


def test_the_order_of_lines_does_not_matter():
    rows = [row for s in (1, 0) for row in answers("cache-to-cache", [1, s, 0.5], seed=s)] + answers(
        "receiver", [0, 1, 0]
    )
    assert figures_of(rows)["methods"]["cache-to-cache"]["seeds"] == {"0": 0.5, "1": pytest.approx(2.5 / 3)}
    shuffled = [rows[i] for i in (8, 1, 5, 3, 0, 7, 2, 4, 6)]
    one, other = (difference(figures_of(some), "cache-to-cache", "receiver") for some in (rows, shuffled))
    assert [one[key] for key in ("difference", "helped", "hurt", "p")] == [
        other[key] for key in ("difference", "helped", "hurt", "p")
    ]


def test_content_is_what_mismatched_has_not():
    fused, mismatched, receiver = [1] * 30 + [0] * 10, [1] * 20 + [0] * 20, [1] * 10 + [0] * 30
    rows = (
        answers("receiver", receiver),
        answers("cache-to-cache", fused, seed=0),
        answers("mismatched", mismatched, seed=0),
    )
    content = figures_of(*rows)["content"]
    assert (content["difference"], content["gain"]["difference"], content["share_of_gain"]) == (0.25, 0.5, 0.5)
    assert content["share_interval"][0] < 0.5 < content["share_interval"][1]
    assert content["interval"] == bootstrap_mean(np.subtract(fused, mismatched), [str(i) for i in range(40)])[1]


def test_without_a_gain_there_is_no_share_of_it():
    rows = (
        answers("receiver", [1, 0] * 9),
        answers("cache-to-cache", [0, 1] * 9, seed=0),
        answers("mismatched", [0, 0] * 9, seed=0),
    )
    content = figures_of(*rows)["content"]
    assert content["difference"] == 0.5
    assert content["share_of_gain"] is None


def test_whole_groups_are_resampled():
    groups = [f"place {i // 4}" for i in range(40)]
    scores = [int(i // 4 % 2) for i in range(40)]  # all four right or all wrong
    low, high = figures_of(answers("receiver", scores, groups=groups))["methods"]["receiver"]["interval"]
    alone = figures_of(answers("receiver", scores))["methods"]["receiver"]["interval"]
    assert high - low > 1.5 * (alone[1] - alone[0])


def test_one_group_for_all_is_none():
    one, none = (figures_of(answers("receiver", RECEIVER, groups=groups)) for groups in (["all"] * 8, None))
    assert one["methods"] == none["methods"]
    assert one["groups"] == 8


def test_what_failed_is_counted_and_wrong():
    rows = answers("receiver", [1, 0, 0, 1], failed=[None, "out of memory", None, None])
    one = figures_of(rows)["methods"]["receiver"]
    assert (one["accuracy"], one["items"], one["failed"], one["unread"]) == (0.5, 4, 1, 0)


def test_an_unfinished_run_is_compared_on_what_both_have_answered():
    task = figures_of(
        answers("receiver", [1, 0, 1, 0]),
        answers("cache-to-cache", [1, 1, None, None], seed=0),
        answers("mismatched", [None] * 4),
    )
    pair = difference(task, "cache-to-cache", "receiver")
    assert (pair["items"], pair["difference"]) == (2, 0.5)
    assert task["methods"]["receiver"]["items"] == 4


def test_methods_without_a_common_item_are_no_pair():
    task = figures_of(answers("receiver", [1, None]), answers("sharer", [None, 1]))
    assert task["pairs"] == []


def test_grades_are_right_from_half_on():
    task = figures_of(answers("receiver", [0.4, 0.6, 0.9]), answers("cache-to-cache", [0.5, 0.7, 0.1], seed=0))
    pair = difference(task, "cache-to-cache", "receiver")
    assert task["graded"]
    assert (pair["helped"], pair["hurt"], pair["difference"]) == (1, 1, pytest.approx(-0.2))


def test_categories_hold_their_items():
    task = figures_of(answers("receiver", [1, 1, 0, 0], category=["b", "a", "b", "b"]))
    assert {
        name: (one["items"], one["methods"]["receiver"]["accuracy"]) for name, one in task["categories"].items()
    } == {"a": (1, 1.0), "b": (3, pytest.approx(1 / 3))}
    assert figures_of(answers("receiver", [1, 0]))["categories"] == {}


def test_tasks_weigh_alike_in_the_mean():
    receiver = answers("receiver", [0] * 30), answers("receiver", [1, 0], task="u")
    fused = answers("cache-to-cache", [1] * 30, seed=0), answers("cache-to-cache", [1, 0], task="u", seed=0)
    record = metrics(run_of(*receiver, *fused, answers("sharer", [1] * 30)))
    assert record["average"]["cache-to-cache"]["accuracy"] == 0.75
    assert record["average"]["cache-to-cache"]["gain"]["difference"] == 0.5
    assert "sharer" not in record["average"]
    assert metrics(run_of(receiver[0]))["average"] is None


def test_latency_by_hand():
    seconds = [0.1, 0.2, 0.3, 0.4, 1.0]
    record = metrics(
        run_of(
            answers("receiver", [1]), timings=timings("receiver", seconds, {"decode": 0.5, "receiver_prefill": 0.25})
        )
    )
    one = record["latency"]["receiver"]
    assert (one["questions"], one["median"], one["mean"], one["tokens"]) == (5, 0.3, pytest.approx(0.4), 2)
    assert one["p95"] == pytest.approx(np.percentile(seconds, 95))
    assert list(one["phases"].items()) == [("receiver_prefill", pytest.approx(0.1)), ("decode", pytest.approx(0.2))]


def test_tokens_that_nobody_counted_are_none():
    uncounted = [row.model_copy(update={"tokens_in": None}) for row in timings("receiver", [0.1, 0.2])]
    one = metrics(run_of(answers("receiver", [1]), timings=uncounted))["latency"]["receiver"]
    assert (one["tokens_in"], one["tokens"]) == (None, 0.5)


def test_figures_are_plain_numbers():
    run = run_of(
        answers("receiver", RECEIVER), answers("cache-to-cache", FUSED, seed=0), timings=timings("receiver", [0.1])
    )
    assert json.loads(json.dumps(metrics(run), allow_nan=False))["tasks"]["t"]["items"] == 8
