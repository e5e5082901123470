import pytest
import torch

from kvfuse.methods import Cascade, Fused, Mismatched, Routed, Router, Single, TextToText, Zeroed
from kvfuse.methods.routing import bag_of_tokens, confident_replies
from kvfuse.model import CacheToCache
from kvfuse.testing import tiny_fuser

PROMPTS = [[{"role": "user", "content": text}] for text in ("What is Oslo?", "Two models read", "hi", "Which language do people speak?")]
OPTIONS = {"max_new_tokens": 5, "do_sample": False}


def other(prompt):
    return PROMPTS[(PROMPTS.index(prompt) + 1) % len(PROMPTS)]


@pytest.fixture
def methods(pair):
    receiver, sharer = pair.receiver, pair.sharers[0]
    router = Router(len(receiver.tokenizer))
    router.fit(bag_of_tokens(PROMPTS, receiver), torch.tensor([1, 0, 1, 0]))
    sure = sorted(confident_replies(PROMPTS, receiver, **OPTIONS)[1])
    return {
        "receiver": Single("receiver", receiver),
        "sharer": Single("sharer", sharer),
        "text-to-text": TextToText(receiver, sharer, "Hint: {question}", "{hint} {question}", hint_tokens=6),
        "routing": Routed(receiver, sharer, router),
        "cascade": Cascade(receiver, sharer, sure[2]),
        "cache-to-cache": Fused(pair),
        "zeroed": Zeroed(pair),
        "mismatched": Mismatched(pair, other),
    }


def texts(method, prompts=PROMPTS, **options):
    return [answer.text for answer in method.generate(prompts, **{**OPTIONS, **options})]


NAMES = ["receiver", "sharer", "text-to-text", "routing", "cascade", "cache-to-cache", "zeroed", "mismatched"]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_answered_as_its_prompts_one_by_one(methods, name):
    method = methods[name]
    assert method.name == name
    assert texts(method) == [texts(method, [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_seconds_are_counted(methods, name):
    assert all(0 < answer.tokens <= 11 and answer.seconds > 0 for answer in methods[name].generate(PROMPTS, **OPTIONS))


def test_the_fused_method_is_the_pairs_own_chat(methods, pair):
    assert texts(methods["cache-to-cache"]) == [pair.chat(prompt, **OPTIONS).strip() for prompt in PROMPTS]


def test_fused_responses_are_fused_by_every_method(pair):
    followed = CacheToCache(pair.receiver, pair.sharers, [tiny_fuser(pair.receiver, pair.sharers[0], fuse_response=True)])
    assert texts(Fused(followed)) == [followed.chat(prompt, **OPTIONS).strip() for prompt in PROMPTS]
    assert texts(Fused(followed)) != texts(Fused(pair))
    closed = CacheToCache(pair.receiver, pair.sharers, [tiny_fuser(pair.receiver, pair.sharers[0], fuse_response=True, gate_init=-1.0)])
    assert texts(Zeroed(closed)) == texts(Mismatched(closed, other)) == texts(Single("receiver", pair.receiver))


def test_text_to_text_reads_the_hint(methods):
    method = methods["text-to-text"]
    hint = method.hints(PROMPTS[:1], **OPTIONS)[0].text
    told = [{"role": "user", "content": f"{hint} {PROMPTS[0][0]['content']}"}]
    assert texts(method, PROMPTS[:1]) == texts(methods["receiver"], [told])


def test_the_router_learns_what_it_is_shown(methods):
    assert texts(methods["routing"]) == [texts(methods[name], [p])[0] for name, p in zip(["sharer", "receiver"] * 2, PROMPTS, strict=True)]


def test_the_cascade_asks_the_sharer_where_the_receiver_is_unsure(methods, pair):
    sure = confident_replies(PROMPTS, pair.receiver, **OPTIONS)[1]
    expected = [
        texts(methods["sharer" if one < methods["cascade"].threshold else "receiver"], [p])[0] for one, p in zip(sure, PROMPTS, strict=True)
    ]
    assert texts(methods["cascade"]) == expected


def test_controls_change_what_the_fuser_sees_and_nothing_else(methods, pair):
    assert texts(methods["zeroed"]) != texts(methods["cache-to-cache"])
    assert texts(methods["mismatched"]) != texts(methods["cache-to-cache"])
    closed = CacheToCache(pair.receiver, pair.sharers, [tiny_fuser(pair.receiver, pair.sharers[0], gate_init=-1.0)])
    for control in (Zeroed(closed), Mismatched(closed, other)):
        assert texts(control) == texts(methods["receiver"])


def test_a_sharer_that_reads_the_same_question_is_not_mismatched(methods, pair):
    assert texts(Mismatched(pair, lambda prompt: prompt)) == texts(methods["cache-to-cache"])
