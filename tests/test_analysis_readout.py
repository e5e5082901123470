"""The receiver's answer from a given cache is the one that the library gives from it."""

import pytest
import torch
from helpers import assert_kv_equal

from kvfuse.analysis.answering import ask
from kvfuse.analysis.readout import ROLES, eager_attention, read, read_alone, read_batches, roles
from kvfuse.analysis.study import Study
from kvfuse.cache.kv import KV
from kvfuse.methods import make_method


@pytest.fixture
def study():
    return Study.tiny()


@pytest.fixture
def batch(study):
    return read(study.pair, study.questions)


def test_the_last_token_gives_the_logits_that_generate_begins_with(study, batch):
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    generated = study.pair.answer(batch.prompt, **options).logits[0]
    torch.testing.assert_close(batch.first_logits(batch.fused), generated)


def test_a_run_leaves_the_caches_as_they_were(study):
    batch = read(study.pair, study.questions[:1])
    first, again = (batch.first_logits(batch.fused) for _ in range(2))
    assert torch.equal(first, again)


def test_variants_of_one_prompt_are_rows(study):
    batch = read(study.pair, study.questions[:1])
    clean, fused = batch.clean, batch.fused
    both = KV(torch.cat([clean.key, fused.key], 1), torch.cat([clean.value, fused.value], 1))
    logits = batch.first_logits(both)
    for row, kv in enumerate((clean, fused)):
        torch.testing.assert_close(logits[row], batch.first_logits(kv)[0])


def test_mixing_all_or_nothing_is_one_of_the_two(batch):
    assert_kv_equal(batch.mix(batch.fused, torch.tensor(True)), batch.fused)
    assert_kv_equal(batch.mix(batch.fused, torch.tensor(False)), batch.clean)


def test_the_receiver_alone_reads_its_clean_cache(study, batch):
    alone = read_alone(study.pair, study.questions, [row.receiver for row in batch.rows])
    assert_kv_equal(alone.clean, batch.clean)


def test_scores_include_the_end(study, batch):
    method = make_method("cache-to-cache", study.pair)
    answers = [[question.answer] for question in study.questions]
    without_end = method.score([question.prompt for question in study.questions], answers)
    assert (batch.score_answers(batch.fused)[1] < [scores[0].log_likelihood for scores in without_end]).all()


def test_answers_score_right_where_the_method_replies_with_them():
    study = Study.embedded(16)
    for name, cache in (("receiver", "clean"), ("cache-to-cache", "fused")):
        right = ask(study, make_method(name, study.pair)).right
        batch = read(study.pair, study.questions)
        assert batch.score_answers(getattr(batch, cache))[0].tolist() == right.tolist()
        assert 0 < right.mean() < 1


def test_roles_tell_template_and_message_apart(study):
    tokenized = study.pair.align([{"role": "user", "content": "Oslo"}]).receiver
    names = [ROLES[role] for role in roles(tokenized)]
    assert names[0] == "template"
    assert names[-1] == "last token"
    assert "message" in names


def test_spread_and_batches_lose_nothing(study):
    assert len(study.spread(2).questions) == 2
    questions = [str(question) for batch in read_batches(study.spread(9)) for question in batch.questions]
    assert sorted(questions) == sorted(map(str, study.questions))


def test_attention_is_put_back_even_after_an_error(study):
    model = study.pair.receiver.model
    before = model.config._attn_implementation
    try:
        with eager_attention(model):
            assert model.config._attn_implementation == "eager"
            raise ValueError
    except ValueError:
        pass
    assert model.config._attn_implementation == before != "eager"
