import pytest
from answers import answers

from kvfuse.analysis.answering import ask
from kvfuse.analysis.overlap import run
from kvfuse.analysis.study import Study
from kvfuse.errors import AnalysisError, EvaluationError
from kvfuse.evaluation.predictions import append
from kvfuse.methods import make_method

RECEIVER = [1, 1, 0, 0, 1, 0, 0, 0]
SHARER = [1, 0, 1, 0, 1, 1, 0, 0]
FUSED = [1, 0, 1, 1, 1, 0, 0, 0]


def saved(folder, *some):
    append(folder / "predictions.jsonl", [row for rows in some for row in rows])
    return str(folder)


def test_what_is_kept_and_lost_of_saved_predictions(tmp_path):
    kinds = {"category": ["a", "a", "a", "a", "b", "b", "b", "b"]}
    rows = [
        answers(name, some, **kinds)
        for name, some in (("receiver", RECEIVER), ("sharer", SHARER), ("cache-to-cache", FUSED))
    ]
    finding = run(None, predictions=saved(tmp_path, *rows))
    assert finding.figures["knowledge"] == {
        "receiver": {"right": 0, "wrong": 1},
        "sharer": {"right": 1, "wrong": 1},
        "receiver+sharer": {"right": 2, "wrong": 0},
        "": {"right": 1, "wrong": 2},
    }
    assert finding.figures["categories"]["b"]["methods"]["sharer"]["accuracy"] == 0.5
    assert "of what only the sharer had right, 50.0%" in finding.reading
    assert "33.3% of the 3 questions" in finding.reading
    words = [text.get_text() for axes in finding.draw().axes for text in (*axes.texts, *axes.get_yticklabels())]
    assert {"only the receiver", "neither", "a", "b", "2"} <= set(words)


def test_without_the_sharer_there_are_two_groups(tmp_path):
    finding = run(None, predictions=saved(tmp_path, answers("receiver", RECEIVER), answers("cache-to-cache", FUSED)))
    assert finding.figures["knowledge"] == {"receiver": {"right": 2, "wrong": 1}, "": {"right": 2, "wrong": 3}}
    assert len(finding.draw().axes) == 1


def test_tasks_are_chosen_by_name(tmp_path):
    rows = [answers(name, RECEIVER, task=task) for task in ("t", "u") for name in ("receiver", "cache-to-cache")]
    folder = saved(tmp_path, *rows)
    assert run(None, predictions=folder).figures["task"] == "t"
    assert run(None, predictions=folder, task="u").figures["task"] == "u"
    with pytest.raises(AnalysisError, match="expected a task of t, u"):
        run(None, predictions=folder, task="v")


def test_both_must_have_answered(tmp_path):
    with pytest.raises(AnalysisError, match="to the same items"):
        run(None, predictions=saved(tmp_path, answers("receiver", RECEIVER)))
    with pytest.raises(EvaluationError, match="got none"):
        run(None, predictions=str(tmp_path / "nothing"))


def test_live_it_is_what_the_methods_answer():
    study = Study.embedded(16)
    figures = run(study).figures
    for name in ("receiver", "sharer", "cache-to-cache"):
        assert figures["methods"][name]["accuracy"] == ask(study, make_method(name, study.pair)).right.mean()
    assert set(figures["categories"]) == {"both-know", "compound", "receiver-knows", "sharer-knows"}
