"""One evaluator: batches of similar length, one rule of grading, latency in turns."""

import pytest

from kvfuse.evaluation.asking import Question, answer_all, ask, in_batches, time_methods
from kvfuse.evaluation.scoring.results import same_answer
from kvfuse.evaluation.scoring.task_scores import TaskScores
from kvfuse.methods import Method
from kvfuse.methods.base import Reply

LENGTHS = [3, 9, 1, 7, 5]


class Echo(Method):
    """Replies with the prompt in upper case, and writes down what it is asked."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def prepare(self, prompts, **options):
        self.log.append((self.name, "prepare", len(prompts)))

    def reply(self, prompts, **options):
        self.log.append((self.name, *prompts))
        if "broken" in prompts:
            raise ValueError("cannot read this")
        return [Reply(prompt.upper(), 2, 3) for prompt in prompts]


def test_the_longest_come_first_and_each_item_once():
    batches = []
    answered = list(in_batches(LENGTHS, lambda indices: batches.append(indices) or [10 * i for i in indices], 2))
    assert batches == [[1, 3], [4, 0], [2]]
    assert answered == [(1, 10), (3, 30), (4, 40), (0, 0), (2, 20)]


def test_an_item_that_fails_spoils_no_other():
    def answer(indices):
        if 4 in indices:
            raise ValueError("too long")
        return indices

    results = dict(in_batches(LENGTHS, answer, 3))
    assert {index for index, result in results.items() if isinstance(result, ValueError)} == {4}
    assert all(results[index] == index for index in (0, 1, 2, 3))


def test_too_few_results_are_a_failure_of_the_batch():
    results = dict(in_batches([1, 1], lambda indices: indices[:1], 2))
    assert results == {0: 0, 1: 1}


def test_results_stand_in_the_order_of_the_items_and_progress_is_counted():
    done = []
    assert answer_all(LENGTHS, lambda indices: [str(i) for i in indices], 2, done.append) == list("01234")
    assert sum(done) == 5


def test_without_a_run_to_go_on_with_an_error_is_raised():
    with pytest.raises(ValueError, match="cannot read this"):
        ask(Echo("echo", []), [Question("fine", "FINE"), Question("broken", "")], 2, task="t")


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("Oslo", "Oslo", True),
        (" oslo\n", "Oslo", True),
        ("<think>Bergen?</think> Oslo", "Oslo", True),
        ("Oslo.", "Oslo", False),
        ("Oslo, Norway", "Oslo", False),
        ("", "Oslo", False),
    ],
)
def test_case_white_space_and_thoughts_do_not_count(reply, answer, right):
    assert same_answer(reply, answer) is right


def test_answers_are_graded_predictions():
    questions = [Question("oslo", "Oslo", "capital", "Norway"), Question("rome, it", "Rome", "capital", "Italy")]
    rows = ask(Echo("echo", []), questions, 2, task="t", seed=3)
    assert [(row.item, row.answer, row.target, row.score) for row in rows] == [
        ("0", "OSLO", "Oslo", 1),
        ("1", "ROME, IT", "Rome", 0),
    ]
    assert {(row.task, row.method, row.seed, row.category, row.tokens, row.tokens_in) for row in rows} == {
        ("t", "echo", 3, "capital", 2, 3)
    }
    assert TaskScores(rows).groups.tolist() == ["group Norway", "group Italy"]


def test_methods_take_turns_after_a_warm_up():
    log = []
    methods = [Echo("one", log), Echo("two", log)]
    timings = time_methods(methods, "t", [(str(i), f"question {i}", {}) for i in range(5)], 2)
    assert log[:4] == [("one", "prepare", 5), ("two", "prepare", 5), ("one", "question 0"), ("two", "question 0")]
    assert log[4:] == [(name, f"question {i}") for i in (0, 3) for name in ("one", "two")]
    assert [(row.item, row.method) for row in timings] == [("0", "one"), ("0", "two"), ("3", "one"), ("3", "two")]
    assert all(row.seconds > 0 and row.tokens == 2 for row in timings)


def test_questions_that_fail_have_no_time():
    assert time_methods([Echo("one", [])], "t", [("0", "broken", {})], 5) == []
    assert time_methods([Echo("one", [])], "t", [], 5) == []
