import json
from dataclasses import replace

import pytest

from kvfuse.analysis.readout import read_batches
from kvfuse.analysis.study import Question, Study, choose
from kvfuse.checkpoint import save_fuser
from kvfuse.errors import AnalysisError
from kvfuse.language_model import LanguageModel
from kvfuse.testing import tiny_fuser


@pytest.fixture(scope="module")
def fuser(saved_models, tmp_path_factory):
    models = [LanguageModel.from_pretrained(saved_models / name) for name in ("receiver", "sharer")]
    return str(save_fuser(tiny_fuser(*models), tmp_path_factory.mktemp("fusers") / "fuser"))


def test_the_embedded_pair_is_asked_about_places_that_it_learnt_nothing_of():
    study = Study.embedded(24)
    assert len(study.questions) == 24
    assert {one.category for one in study.questions} == {"sharer-knows", "receiver-knows", "both-know", "compound"}
    assert study.lessons
    assert not {one.group for one in study.questions} & {one.group for one in study.lessons}


def test_batches_hold_every_question_once():
    study = replace(Study.tiny(), batch_size=3)
    batches = list(study.batches())
    assert [len(batch) for batch in batches] == [3, 1]
    assert sorted(index for batch in batches for index in batch) == [0, 1, 2, 3]
    assert [len(batch.rows) for batch in read_batches(study)] == [3, 1]


def test_a_question_without_a_group_is_one_of_its_own(pair):
    study = Study(pair, [Question("a"), Question("b"), Question("c", group="d"), Question("e", group="d")])
    assert study.groups.tolist() == ["question 0", "question 1", "d", "d"]
    with pytest.raises(AnalysisError, match="got 4 without"):
        study.with_answers()


def test_data_of_ones_own(fuser, saved_models, tmp_path):
    rows = [{"prompt": f"question {i}", "response": str(i), "subject": "law"} for i in range(5)] + [{"nothing": 1}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    study = choose(
        [fuser], f"{tmp_path}/data.jsonl", str(saved_models / "receiver"), [str(saved_models / "sharer")], limit=3
    )
    assert [(one.prompt[0]["content"], one.answer, one.category) for one in study.questions] == [
        (f"question {i}", str(i), "law") for i in range(3)
    ]
    (tmp_path / "empty.jsonl").write_text('{"nothing": 1}\n')
    with pytest.raises(AnalysisError, match="prompts with responses"):
        choose([fuser], f"{tmp_path}/empty.jsonl", str(saved_models / "receiver"), [str(saved_models / "sharer")])


@pytest.mark.parametrize("given", [{"fuser": ["x"]}, {"data": "x"}, {"receiver": "x"}, {"sharer": ["x"]}])
def test_half_a_pair_is_refused(given):
    with pytest.raises(AnalysisError, match="both --fuser and --data"):
        choose(**given)
