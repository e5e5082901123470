"""What the fused cache makes the receiver say."""

import pytest
import torch

from kvfuse.analysis.lens import ORDERS, _wanted, by_layer, final_norm, look, most_needed, run
from kvfuse.analysis.readout import read
from kvfuse.analysis.study import Study


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3_text", "gpt_neox", "falcon_h1"])
def test_none_fused_is_alone_and_all_fused_is_fused(family):
    study = Study.tiny(family)
    one = look(study.pair, study.questions[0])
    for order in ORDERS:
        assert one[order][0] == pytest.approx(one["layers"]["alone"][-1], rel=1e-3)
        assert one[order][-1] == pytest.approx(one["layers"]["fused"][-1], rel=1e-3)
        assert len(one[order]) == len(one["tokens"]) + 1 == len(one["lost"]) + 1


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gpt_neox"])
def test_the_lens_after_the_last_layer_is_the_model(family):
    """Its last hidden state is normed already, so the one before it is run through the last layer by a hook."""
    study = Study.tiny(family)
    model, heard = study.pair.receiver.model, []
    batch = read(study.pair, study.questions[:1])
    hook = final_norm(model).register_forward_hook(
        lambda _, inputs, out: heard.append(model.get_output_embeddings()(out[:, -1]))
    )
    logits = batch.first_logits(batch.fused)
    hook.remove()
    torch.testing.assert_close(heard[-1], logits)
    wanted = _wanted(batch)
    assert by_layer(batch, batch.fused, wanted)[-1] == pytest.approx(float(logits.softmax(-1)[0, wanted]))


def test_the_first_position_alone_is_the_first_step():
    study = Study.tiny()
    one = look(study.pair, study.questions[0])
    count = len(one["tokens"])
    assert one["lost"][-1] == pytest.approx(one[ORDERS[0]][count] - one[ORDERS[0]][count - 1], abs=1e-6)
    assert one["lost"][0] == pytest.approx(one[ORDERS[1]][count] - one[ORDERS[1]][count - 1], abs=1e-6)


def test_most_needed_counts_prompts():
    looks = [
        {"lost": [0.1, 0.5], "tokens": ["a", "b"]},
        {"lost": [0.0, 0.1], "tokens": ["c", "b"]},
        {"lost": [0.3, 0], "tokens": ["a", "b"]},
    ]
    assert most_needed(looks) == {"token": "b", "share": pytest.approx(2 / 3), "lost": pytest.approx(0.3)}


def test_the_wanted_token_begins_the_right_answer_or_what_the_receiver_says():
    study = Study.tiny()
    known = study.questions[0]
    said, first = (_wanted(read(study.pair, [one])) for one in (type(known)(known.prompt), known))
    batch = read(study.pair, [known])
    assert first == study.pair.receiver.tokenizer(known.answer, add_special_tokens=False).input_ids[0]
    assert said == int(batch.first_logits(batch.fused).argmax()) != first


def test_a_question_without_an_answer_is_looked_at_too():
    study = Study.tiny()
    asked = [type(one)(one.prompt) for one in study.questions]
    figures = run(Study(study.pair, asked)).figures
    assert figures["questions"] == 4
    assert figures["probability"][ORDERS[0]][-1] == pytest.approx(figures["layers"]["fused"][-1], rel=1e-3)
