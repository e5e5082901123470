"""The receiver's answer from a given cache is the one that the library gives from it."""

import torch

from kvfuse.analysis.readout import ROLES, answer_ids, batches, eager, first_run, judge, mix, read, roles, spread
from kvfuse.analysis.study import Study
from kvfuse.cache.kv import KV
from kvfuse.methods import make_method


def tiny():
    return Study.tiny()


def test_the_first_run_gives_the_logits_that_generate_begins_with():
    study = tiny()
    seen = read(study.pair, study.questions)
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    generated = study.pair.answer(seen.prompt, **options).logits[0]
    torch.testing.assert_close(first_run(study.pair.receiver.model, seen, seen.fused).logits[:, -1], generated)


def test_a_run_leaves_what_was_read_as_it_was():
    study = tiny()
    seen = read(study.pair, study.questions[:1])
    first, again = (first_run(study.pair.receiver.model, seen, seen.fused).logits for _ in range(2))
    assert torch.equal(first, again)


def test_variants_of_one_prompt_are_rows():
    study = tiny()
    seen = read(study.pair, study.questions[:1])
    both = KV(*(torch.cat(parts, 1) for parts in ((seen.own.key, seen.fused.key), (seen.own.value, seen.fused.value))))
    logits = first_run(study.pair.receiver.model, seen, both).logits[:, -1]
    for row, kv in enumerate((seen.own, seen.fused)):
        torch.testing.assert_close(logits[row], first_run(study.pair.receiver.model, seen, kv).logits[0, -1])


def test_mixing_all_or_nothing_is_one_of_the_two():
    seen = read(tiny().pair, tiny().questions)
    assert torch.equal(mix(seen.own, seen.fused, torch.tensor(True)).key, seen.fused.key)
    assert torch.equal(mix(seen.own, seen.fused, torch.tensor(False)).value, seen.own.value)


def test_judging_is_scoring_with_the_end():
    study = tiny()
    seen, method = read(study.pair, study.questions), make_method("cache-to-cache", study.pair)
    answers = [one.answer for one in study.questions]
    judged = judge(study.pair, seen.readings, seen.prompt, seen.prefilled, seen.fused, answers)
    scored = method.score([one.prompt for one in study.questions], [[answer] for answer in answers])
    assert (judged[1] < [scores[0].log_likelihood for scores in scored]).all()  # the end has its price


def test_what_is_said_greedily_is_judged_right():
    study = tiny()
    seen = read(study.pair, study.questions[:1])
    tokenizer = study.pair.receiver.tokenizer
    wanted = int(answer_ids(study.pair, seen, [study.questions[0]]))
    assert wanted == tokenizer(study.questions[0].answer, add_special_tokens=False).input_ids[0]
    assert judge(study.pair, seen.readings, seen.prompt, seen.prefilled, seen.fused, ["x"])[0] == 0


def test_roles_tell_template_and_message_apart():
    reading = tiny().pair.align([{"role": "user", "content": "Oslo"}]).receiver
    names = [ROLES[role] for role in roles(reading)]
    assert names[0] == "template"
    assert names[-1] == "last token"
    assert "message" in names


def test_spread_and_batches_lose_nothing():
    study = tiny()
    assert len(spread(study, 2)) == 2
    assert sorted(str(one) for batch in batches(spread(study, 9), 3) for one in batch) == sorted(
        map(str, study.questions)
    )


def test_attention_is_put_back_even_after_an_error():
    model = tiny().pair.receiver.model
    before = model.config._attn_implementation
    try:
        with eager(model):
            assert model.config._attn_implementation == "eager"
            raise ValueError
    except ValueError:
        pass
    assert model.config._attn_implementation == before != "eager"
