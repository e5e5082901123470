"""The cache-enrichment oracle: what must be equal is equal."""

import numpy as np
import pytest
import torch

from kvfuse.analysis.enrichment import enrich, kept_tokens, run
from kvfuse.analysis.readout import read
from kvfuse.analysis.study import Study
from kvfuse.errors import AnalysisError, PairError
from kvfuse.prompts.messages import as_chat


def behind_a_shot(question):
    shot = [{"role": "user", "content": "What is the capital?"}, {"role": "assistant", "content": "Oslo"}]
    return [*shot, *as_chat(question.prompt)]


@pytest.mark.parametrize("positions", ["moved", "kept"])
def test_no_shots_are_direct(positions):
    figures = run(Study.tiny(), shots=0, positions=positions).figures
    assert figures["ways"]["oracle"] == figures["ways"]["direct"] == figures["ways"]["in sight"]
    assert all(one == figures["ways"]["direct"] for one in figures["layers"])


def test_all_layers_together_are_the_full_oracle():
    figures = run(Study.tiny(), shots=2).figures
    assert figures["cumulative"]["best"][-1] == figures["cumulative"]["worst"][-1] == figures["ways"]["oracle"]
    assert figures["ways"]["oracle"] != figures["ways"]["direct"]


def test_one_layer_is_the_best_and_another_the_worst():
    figures = run(Study.tiny(), shots=2).figures
    nats = [one["nats"] for one in figures["layers"]]
    assert figures["cumulative"]["best"][0]["nats"] == max(nats)
    assert figures["cumulative"]["worst"][0]["nats"] == min(nats)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt_neox"])
def test_moving_and_keeping_positions_are_the_same_to_a_rotary_model(family):
    study = Study.tiny(family)
    found = [
        run(study, shots=2, positions=positions).figures["ways"]["oracle"]["nats"] for positions in ("moved", "kept")
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_the_oracle_is_the_slice_of_the_longer_cache():
    study = Study.tiny()
    asked = study.questions[:1]
    one = enrich(study.pair, asked, [behind_a_shot(asked[0])], "kept")
    full = read(study.pair, [type(asked[0])(behind_a_shot(asked[0]))]).clean
    length = one.direct.clean.key.shape[3]
    torch.testing.assert_close(one.oracle.key, full.key[:, :, :, -length:])
    torch.testing.assert_close(one.oracle.value, full.value[:, :, :, -length:])


def test_padding_changes_nothing():
    study = Study.tiny()
    chats = [behind_a_shot(question) for question in study.questions]
    together = enrich(study.pair, study.questions, chats).score([0, 1, 2])
    alone = [
        enrich(study.pair, [question], [chat]).score([0, 1, 2])[:, 0]
        for question, chat in zip(study.questions, chats, strict=True)
    ]
    np.testing.assert_allclose(together, np.stack(alone, 1), atol=1e-3)


def test_a_hint_within_the_message_leaves_what_stands_before_it():
    kept = kept_tokens(np.array([1, 2, 3, 4]), np.array([1, 2, 9, 9, 3, 4]))
    assert kept.tolist() == [0, 1, 4, 5]
    assert kept_tokens(np.array([1, 2]), np.array([1, 2, 1, 2])).tolist() == [2, 3]
    assert kept_tokens(np.array([1, 2]), np.array([1, 2])).tolist() == [0, 1]


@pytest.mark.parametrize("behind", [[9], [1, 9, 2, 4], [9, 9, 9, 9]])
def test_a_context_that_changes_the_question_is_refused(behind):
    with pytest.raises(AnalysisError, match="leaves the question's own tokens"):
        kept_tokens(np.array([1, 2, 3]), np.array(behind))


def test_a_hint_of_the_sharer_is_the_default():
    finding = run(Study.tiny())
    assert finding.figures["context"] == "a hint"
    assert set(finding.figures["categories"]) == {"capital", "language"}


def test_what_cannot_be_done_is_refused():
    with pytest.raises(AnalysisError, match="positions"):
        run(Study.tiny(), positions="elsewhere")
    with pytest.raises(PairError, match="rotary"):
        run(Study.tiny("gpt2"), shots=1, positions="moved")
    assert run(Study.tiny("gpt2"), shots=1).figures["positions"] == "kept"
