import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvfuse.errors import MethodError
from kvfuse.methods import (
    METHODS,
    Fused,
    Hybrid,
    Method,
    Mismatched,
    Reply,
    Router,
    Single,
    Zeroed,
    make_method,
    register_method,
)
from kvfuse.methods.registry import GROUP
from kvfuse.methods.routing import bag_of_tokens, confident_replies, threshold_for
from kvfuse.model import CacheToCache
from kvfuse.testing import tiny_fuser

QUESTION = "What is it?\n\nA. Oslo\nB. a model\nC. hi"
PROMPTS = [
    [{"role": "user", "content": text}] for text in ("What is Oslo?", QUESTION, "hi", "Which language do people speak?")
]
OPTIONS = {"max_new_tokens": 4, "do_sample": False}
CHOICES = [["A", "B", "C"], ["A", "B", "C"], ["Oslo", "the same question"], ["A"]]
EXAMPLES = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]
HINTS = {"hint_request": "Hint: {question}", "hint_tokens": 4}
NAMES = list(METHODS)


@dataclass
class Offer:
    """An entry point of a package that offers a method."""

    name: str
    maker: Any

    def load(self):
        return self.maker


@pytest.fixture(scope="module")
def pair(receiver, sharer):
    return CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])


@pytest.fixture(scope="module")
def router(pair):
    router = Router(len(pair.receiver.tokenizer))
    router.fit(bag_of_tokens(PROMPTS, pair.receiver), torch.tensor([1, 0, 1, 0]))
    return router


@pytest.fixture(scope="module")
def methods(pair, router):
    """All of them, prepared for the prompts."""
    made = {name: make_method(name, pair, router=router, examples=EXAMPLES, **HINTS) for name in NAMES}
    for method in made.values():
        method.prepare(PROMPTS, **OPTIONS)
    return made


@pytest.fixture(scope="module")
def answers(methods):
    """The answers of each method to all prompts at once."""
    return {name: method.generate(PROMPTS, **OPTIONS) for name, method in methods.items()}


def texts(method, prompts=PROMPTS, **options):
    return [answer.text for answer in method.generate(prompts, **{**OPTIONS, **options})]


def likely(method, prompts=PROMPTS, choices=CHOICES):
    return [[score.log_likelihood for score in scores] for scores in method.score(prompts, choices)]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_answered_as_its_prompts_one_by_one(methods, answers, name):
    method = methods[name]
    assert method.name == name
    assert [answer.text for answer in answers[name]] == [texts(method, [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_scored_as_its_prompts_one_by_one(methods, name):
    single = [likely(methods[name], [prompt], [choices])[0] for prompt, choices in zip(PROMPTS, CHOICES, strict=True)]
    for scores, expected, choices in zip(likely(methods[name]), single, CHOICES, strict=True):
        assert len(scores) == len(choices)
        assert scores == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_is_the_answer_in_pieces(methods, answers, name):
    pieces = list(methods[name].stream(PROMPTS[0], **OPTIONS))
    assert "".join(pieces).strip() == answers[name][0].text


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_seconds_are_counted(answers, name):
    for answer in answers[name]:
        assert (answer.tokens == 0) if name == "calibrated" and "answer is" in answer.text else (0 < answer.tokens <= 8)
        assert min(answer.seconds, answer.tokens_in) > 0
        assert answer.phases == {}


def test_what_both_models_read_is_counted_twice(answers):
    receiver, sharer, fused, cascade = (
        [answer.tokens_in for answer in answers[name]] for name in ("receiver", "sharer", "cache-to-cache", "cascade")
    )
    assert fused == [first + second for first, second in zip(receiver, sharer, strict=True)]
    assert sorted(both - first for first, both in zip(receiver, cascade, strict=True))[:3].count(0) == 2  # half of them
    assert all(read in (first, both) for read, first, both in zip(cascade, receiver, fused, strict=True))


def test_closed_gates_score_as_the_receiver(methods, pair):
    closed = CacheToCache(pair.receiver, pair.sharers, [tiny_fuser(pair.receiver, pair.sharers[0], gate_init=-1.0)])
    for fused, receiver, opened in zip(
        *map(likely, (Fused(closed), methods["receiver"], methods["cache-to-cache"])), strict=True
    ):
        assert fused == pytest.approx(receiver, abs=1e-4)
        assert fused != pytest.approx(opened, abs=1e-2)


def test_the_fused_method_is_the_pairs_own_chat(answers, pair):
    assert [answer.text for answer in answers["cache-to-cache"]] == [
        pair.chat(prompt, **OPTIONS).strip() for prompt in PROMPTS
    ]


def test_fused_responses_are_fused_by_every_method(pair):
    followed = CacheToCache(
        pair.receiver, pair.sharers, [tiny_fuser(pair.receiver, pair.sharers[0], fuse_response=True)]
    )
    assert texts(Fused(followed)) == [followed.chat(prompt, **OPTIONS).strip() for prompt in PROMPTS]
    assert texts(Fused(followed)) != texts(Fused(pair))
    closed = CacheToCache(
        pair.receiver, pair.sharers, [tiny_fuser(pair.receiver, pair.sharers[0], fuse_response=True, gate_init=-1.0)]
    )
    mismatched = Mismatched(closed, lambda prompt: PROMPTS[(PROMPTS.index(prompt) + 1) % len(PROMPTS)])
    assert texts(Zeroed(closed)) == texts(mismatched) == texts(Single("receiver", pair.receiver))


def test_text_to_text_reads_the_hint(methods, pair):
    method = make_method("text-to-text", pair, hint_reading="{hint} {question}", **HINTS)
    hint = method.hints(PROMPTS[:1], **OPTIONS)[0].text
    hinted = [{"role": "user", "content": f"{hint} {PROMPTS[0][0]['content']}"}]
    assert texts(method, PROMPTS[:1]) == texts(methods["receiver"], [hinted])


@pytest.mark.parametrize(("name", "reader"), [("text-to-text", "receiver"), ("hybrid", "cache-to-cache")])
def test_a_hint_is_read_as_two_turns_before_the_question(methods, name, reader):
    system = {"role": "system", "content": "Answer."}
    hint = methods[name].hints([[system, *PROMPTS[1]]], **OPTIONS)[0]
    request = {"role": "user", "content": f"Hint: {QUESTION}"}
    hinted = [system, request, {"role": "assistant", "content": hint.text}, *PROMPTS[1]]
    assert hint.text == texts(methods["sharer"], [[system, request]], max_new_tokens=4)[0]
    assert texts(methods[name], [[system, *PROMPTS[1]]]) == texts(methods[reader], [hinted])
    assert (
        likely(methods[name], [[system, *PROMPTS[1]]], CHOICES[1:2])[0]
        == likely(methods[reader], [hinted], CHOICES[1:2])[0]
    )


def test_a_hint_without_sight_of_the_options(methods, pair):
    def without_options(prompt):
        return [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"].partition("\n")[0]}]

    blind = make_method("text-to-text", pair, sees_options=False, without_options=without_options, **HINTS)
    (hinted,) = blind.augment(PROMPTS[1:2])
    assert [message["content"] for message in hinted.prompt[::2]] == ["Hint: What is it?", QUESTION]
    with pytest.raises(MethodError, match="without_options"):
        make_method("hybrid", pair, sees_options=False)


def test_examples_follow_the_system_message(methods):
    system = {"role": "system", "content": "Answer."}
    asked = [[system, *PROMPTS[0]], PROMPTS[0], "hi"]
    user = [{"role": "user", "content": "hi"}]
    expected = [[system, *EXAMPLES, *PROMPTS[0]], [*EXAMPLES, *PROMPTS[0]], [*EXAMPLES, *user]]
    assert texts(methods["few-shot"], asked) == texts(methods["receiver"], expected)


def test_the_router_learns_what_it_is_shown(methods):
    assert likely(methods["routing"])[1] == pytest.approx(likely(methods["receiver"])[1], abs=1e-4)
    assert likely(methods["routing"])[2] == pytest.approx(likely(methods["sharer"])[2], abs=1e-4)
    assert texts(methods["routing"]) == [
        texts(methods[name], [p])[0] for name, p in zip(["sharer", "receiver"] * 2, PROMPTS, strict=True)
    ]


def test_the_cascade_asks_the_sharer_where_the_receiver_is_unsure(methods, pair):
    sure = confident_replies(PROMPTS, pair.receiver, **OPTIONS)[1]
    cascade = make_method("cascade", pair, confidence=sorted(sure)[2])
    expected = ["sharer" if confidence < sorted(sure)[2] else "receiver" for confidence in sure]
    assert sorted(expected) == ["receiver"] * 2 + ["sharer"] * 2
    assert texts(cascade) == [texts(methods[name], [prompt])[0] for name, prompt in zip(expected, PROMPTS, strict=True)]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("name", ["routing", "cascade"])
def test_a_share_of_the_questions_goes_to_the_sharer(pair, router, name, share):
    method = make_method(name, pair, router=router, share=share)
    with pytest.raises(MethodError, match="prepare"):
        method.generate(PROMPTS, **OPTIONS)
    method.prepare(PROMPTS, **OPTIONS)
    scores = method.sharer_scores(PROMPTS)
    assert method.to_sharer(scores) == [
        score in sorted(scores)[len(PROMPTS) - round(share * len(PROMPTS)) :] for score in scores
    ]


def test_the_threshold_lies_between_two_scores():
    assert threshold_for(0.5, [4.0, 1.0, 2.0, 3.0]) == 2.5
    assert (threshold_for(0.0, [1.0]), threshold_for(1.0, [1.0])) == (math.inf, -math.inf)


def test_methods_are_made_by_name(pair, methods):
    with pytest.raises(MethodError, match=r"method to be one of .* did you mean 'text-to-text'"):
        make_method("text2text", pair)
    with pytest.raises(MethodError, match="unknown 'hint_token'; did you mean 'hint_tokens'"):
        make_method("receiver", pair, hint_token=3)
    with pytest.raises(MethodError, match="trained router"):
        make_method("routing", pair)
    with pytest.raises(MethodError, match="expected examples"):
        make_method("few-shot", pair)
    made = {name: type(methods[name]) for name in ("receiver", "sharer", "hybrid", "cache-to-cache")}
    assert made == {"receiver": Single, "sharer": Single, "hybrid": Hybrid, "cache-to-cache": Fused}


def test_methods_of_packages_and_by_hand(pair, monkeypatch):
    class Silent(Method):
        name = "silent"

        def reply(self, prompts, **options):
            return [Reply("", 0, 0) for _ in prompts]

    monkeypatch.setattr("kvfuse.methods.registry.METHODS", dict(METHODS))
    monkeypatch.setattr(
        "kvfuse.support.plugins.entry_points",
        lambda group: [Offer("silent", lambda context: Silent())] if group == GROUP else [],
    )
    silent = make_method("silent", pair)
    assert texts(silent) == [""] * 4
    assert list(silent.stream(PROMPTS[0])) == [""]
    silent.prepare(PROMPTS)
    with pytest.raises(MethodError, match="only generates"):
        silent.score(PROMPTS, CHOICES)
    for name, maker, reason in (("silent", Silent, "taken"), ("loud", "no function", "MethodContext")):
        with pytest.raises(MethodError, match=reason):
            register_method(name, maker)
