import json

import pytest

from kvfuse.errors import EvaluationError
from kvfuse.evaluation.predictions import Prediction, Timing, append, read_predictions, read_run


def prediction(item="1", **fields):
    return Prediction(
        task="t", item=item, method="receiver", prompt_hash="0", answer="A — ä\n", target="A", score=1, **fields
    )


def test_what_is_appended_is_read(tmp_path):
    path = tmp_path / "new" / "predictions.jsonl"
    rows = [
        prediction("1", seed=0, group="g", seconds=0.5),
        prediction("1", seed=1),
        prediction("2", extracted="A\u2028"),
    ]
    append(path, rows[:1])
    append(path, rows[1:])
    assert read_predictions(path) == rows
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("kept", [0, 2])
def test_a_killed_run_goes_on(tmp_path, kept):
    """Wherever the last write was cut: whole lines are read, and the next append starts a line of its own."""
    path, rows = tmp_path / "predictions.jsonl", [prediction(str(i)) for i in range(4)]
    append(path, rows[: kept + 1])
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in (1, len(last) // 2, len(last) - 1):
        path.write_bytes(whole[: len(whole) - cut])
        assert read_predictions(path) == rows[:kept]
        append(path, rows[kept:])
        assert read_predictions(path) == rows


def test_an_empty_batch_changes_nothing(tmp_path):
    append(tmp_path / "predictions.jsonl", [])
    assert read_predictions(tmp_path / "predictions.jsonl") == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"score": 1.5}, "score"),
        ({"score": "right"}, "score"),
        ({"score": None}, "score"),
        ({"item": 7}, "item"),
        ({"colour": "red"}, "colour"),
        ({"failed": "out of memory"}, "an item that failed scores 0"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_line(tmp_path, change, field):
    path = tmp_path / "predictions.jsonl"
    append(path, [prediction()])
    with path.open("a") as file:
        file.write(json.dumps({**prediction("2").model_dump(), **change}) + "\n")
    with pytest.raises(EvaluationError, match=f"{field}.*") as error:
        read_predictions(path)
    assert f"{path}, line 2" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_field_is_named(tmp_path):
    (tmp_path / "predictions.jsonl").write_text('{"task": "t"}\n')
    with pytest.raises(EvaluationError, match=r"expected item to be right in .*line 1 \(field required\)"):
        read_predictions(tmp_path / "predictions.jsonl")


def test_what_is_no_json_is_refused_in_the_middle(tmp_path):
    (tmp_path / "predictions.jsonl").write_text('{"task": \n{}\n')
    with pytest.raises(EvaluationError, match="line 1"):
        read_predictions(tmp_path / "predictions.jsonl")


def test_an_item_is_answered_once(tmp_path):
    append(tmp_path / "predictions.jsonl", [prediction("1"), prediction("2"), prediction("1")])
    with pytest.raises(EvaluationError, match="lines 1 and 3"):
        read_predictions(tmp_path / "predictions.jsonl")


def test_a_folder_is_read_whole(tmp_path):
    timing = Timing(task="t", item="1", method="receiver", seconds=0.1, tokens_in=5, tokens=2, phases={"decode": 0.1})
    append(tmp_path / "predictions.jsonl", [prediction()])
    append(tmp_path / "latency.jsonl", [timing])
    (tmp_path / "config.yaml").write_text("receiver: a\n")
    run = read_run(tmp_path)
    assert (run.name, run.predictions, run.timings) == (tmp_path.name, [prediction()], [timing])
    assert (run.config, run.versions) == ({"receiver": "a"}, {})


def test_an_empty_folder_is_no_run(tmp_path):
    with pytest.raises(EvaluationError, match="expected predictions in"):
        read_run(tmp_path)


def test_a_damaged_configuration_is_named(tmp_path):
    append(tmp_path / "predictions.jsonl", [prediction()])
    (tmp_path / "config.yaml").write_text("- a\n")
    with pytest.raises(EvaluationError, match=r"expected keys and values in .*config\.yaml"):
        read_run(tmp_path)
