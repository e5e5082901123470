import json

import pytest
import torch
import yaml
from answers import answers

from kvfuse.analysis.scaling import run
from kvfuse.analysis.study import Study
from kvfuse.analysis.training_curve import train_and_ask
from kvfuse.errors import AnalysisError
from kvfuse.evaluation.predictions import append
from kvfuse.language_model import LanguageModel

RIGHT = {"receiver": [1, 0, 0, 0], "cache-to-cache": [1, 1, 1, 0]}


def evaluation(folder, config=None, **fields):
    append(folder / "predictions.jsonl", [row for name, some in RIGHT.items() for row in answers(name, some, **fields)])
    (folder / "config.yaml").write_text(yaml.safe_dump(config or {}))
    return str(folder)


def training(folder, tokens, fused):
    folder.mkdir(parents=True)
    told = {"receiver": 1.0, "fused": fused, "mismatched": 0.9, "training": {"tokens": tokens}}
    (folder / "result.json").write_text(json.dumps(told))
    return str(folder)


def test_trainings_in_the_order_of_their_tokens(tmp_path):
    finding = run(None, runs=[training(tmp_path / "b", 2000, 0.5), training(tmp_path / "a", 1000, 0.75)])
    assert [
        (point["run"], point["x"], point["bits_per_character"]["fused"]) for point in finding.figures["points"]
    ] == [("a", 1000, 0.75), ("b", 2000, 0.5)]
    assert "from 0.750 bits per character to 0.500" in finding.reading
    (axes,) = finding.draw().axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training.tokens", "held-out bits per character")


def test_a_training_without_a_control_is_drawn_without_it(tmp_path):
    folder = training(tmp_path / "a", 1000, 0.75)
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    (tmp_path / "a" / "result.json").write_text(json.dumps({**result, "mismatched": None}))
    finding = run(None, runs=[folder, training(tmp_path / "b", 2000, 0.5)])
    assert finding.figures["points"][0]["bits_per_character"] == {"receiver": 1.0, "fused": 0.75}
    assert len(finding.draw().axes) == 1


def test_evaluations_know_the_training_of_their_fuser(tmp_path):
    training(tmp_path / "trained", 3000, 0.5)
    folder = evaluation(tmp_path / "evaluated", {"fuser": [f"{tmp_path}/trained/fuser"], "evaluation": {"limit": 4}})
    (point,) = run(None, runs=[folder]).figures["points"]
    assert point["x"] == 3000
    assert point["methods"]["cache-to-cache"]["accuracy"] == 0.75
    assert point["gain"]["difference"] == 0.5
    finding = run(None, runs=[folder], against="evaluation.limit")
    assert finding.figures["points"][0]["x"] == 4
    assert len(finding.draw().axes) == 3


def test_sizes_are_counted_and_numbers_may_be_given(tmp_path, saved_models, receiver):
    folder = evaluation(tmp_path / "run", {"receiver": str(saved_models / "receiver")})
    (point,) = run(None, runs=[folder], against="receiver.parameters").figures["points"]
    assert (
        point["x"]
        == LanguageModel.from_pretrained(saved_models / "receiver").model.num_parameters()
        == receiver.model.num_parameters()
    )
    assert run(None, runs=[folder], against="size (B)", at=[0.6]).figures["points"][0]["x"] == 0.6


def test_lengths_cut_an_evaluation_into_quarters(tmp_path):
    folder = evaluation(tmp_path / "run", tokens_in=[40, 10, 20, 30])
    points = run(None, runs=[folder], against="tokens_in").figures["points"]
    assert [point["x"] for point in points] == [10, 20, 30, 40]
    assert [point["gain"]["difference"] for point in points] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": "training.tokens"}, "expected a number at 'training.tokens'"),
        ({"against": "receiver"}, "expected a number at 'receiver'"),
        ({"against": "tokens_in"}, "got items without"),
        ({"at": [1, 2]}, "expected a number for each of 1 runs"),
        ({"at": [1], "task": "u"}, "expected a task of t"),
    ],
)
def test_what_a_run_does_not_tell_is_said(tmp_path, options, message):
    folder = evaluation(tmp_path / "run", {"receiver": "somewhere"})
    with pytest.raises(AnalysisError, match=message):
        run(None, runs=[folder], **options)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(AnalysisError, match="expected a run in"):
        run(None, runs=[str(tmp_path)])


def test_a_new_fuser_is_asked_while_it_learns_and_the_pair_is_left_alone(monkeypatch):
    monkeypatch.setattr("kvfuse.analysis.training_curve.SMOKE_STEPS", (2, 16))
    study = Study.tiny()
    before = [weight.clone() for weight in study.pair.fusers[0].parameters()]
    figures = train_and_ask(study).figures
    assert figures["steps"] == [2, 16]
    first, last = figures["asked"]
    assert 0 < 8 * figures["tokens"][0] == figures["tokens"][1]
    assert last["bits_per_character"] < first["bits_per_character"]
    assert all(torch.equal(one, other) for one, other in zip(before, study.pair.fusers[0].parameters(), strict=True))


def test_a_pair_without_lessons_needs_runs(pair):
    with pytest.raises(AnalysisError, match="got none; give runs"):
        run(Study(pair, []))
