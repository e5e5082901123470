"""Scores of given answers: over the cache of a prompt read once, equal to those of one run over the whole."""

import pytest
import torch

from kvfuse.methods import Fused, Single
from kvfuse.model import CacheToCache
from kvfuse.prompts.response import tokenize_continuation
from kvfuse.prompts.tokenized import tokenize
from kvfuse.testing import FAMILIES, tiny_fuser, tiny_model
from kvfuse.training.data.encoding import Encoder
from kvfuse.training.data.examples import Example
from kvfuse.training.loop.batches import collate
from kvfuse.training.loop.loss import response_loss

CHATS = [[{"role": "user", "content": text}] for text in ("What is the capital of Norway?", "hi", "Two models read")]
PROMPTS = [*CHATS, "The capital of Norway is", "Q"]
OPTIONS = [
    ["Oslo", "the same question, and more", "A"],
    ["hi"],
    ["A", "B", "C", "Rotterdam"],
    [" Oslo", " it", "!"],
    ["uestion", " 1"],
]


def whole(model, prompt, text):
    """The score of a text by one run over prompt and text, without a cache."""
    reading = tokenize(prompt, model.tokenizer)
    ids = torch.from_numpy(tokenize_continuation(reading, text, model.tokenizer)[0])
    logits = (
        model.model(torch.cat([torch.from_numpy(reading.ids), ids])[None]).logits[0, len(reading.ids) - 1 : -1].float()
    )
    return logits.log_softmax(-1).gather(1, ids[:, None]).sum().item(), bool((logits.argmax(-1) == ids).all()), len(ids)


def close(scores, expected):
    return all(
        abs(left.log_likelihood - right.log_likelihood) < 1e-4
        and (left.greedy, left.tokens) == (right.greedy, right.tokens)
        for left, right in zip(scores, expected, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_scores_are_those_of_one_run_without_a_cache(family):
    model = tiny_model(family)
    for prompt, texts, scores in zip(PROMPTS, OPTIONS, Single("receiver", model).score(PROMPTS, OPTIONS), strict=True):
        for text, score in zip(texts, scores, strict=True):
            likely, greedy, tokens = whole(model, prompt, text)
            assert score.log_likelihood == pytest.approx(likely, abs=1e-4)
            assert (score.greedy, score.tokens) == (greedy, tokens)


def test_what_a_model_would_say_is_greedy(receiver):
    """Of what random models say, only some is a text of one token that is read as it was written."""
    single, tokenizer = Single("receiver", receiver), receiver.tokenizer
    prompts = [[{"role": "user", "content": f"{number}"}] for number in range(40)]
    said = {row: reply.text for row, reply in enumerate(single.reply(prompts, max_new_tokens=1, do_sample=False))}
    rows = [row for row, text in said.items() if text and "\ufffd" not in text and len(tokenizer(text).input_ids) == 1]
    scores = single.score([prompts[row] for row in rows], [[said[row], "Rotterdam"] for row in rows])
    assert [own.greedy for own, _ in scores].count(True) >= len(rows) / 2 > 3
    assert not any(foreign.greedy for _, foreign in scores)


def test_prompts_of_one_token_and_prompts_without_options(receiver):
    single = Single("receiver", receiver)
    (scores,) = single.score(["Q"], [["uestion"]])
    assert scores[0].log_likelihood == pytest.approx(whole(receiver, "Q", "uestion")[0], abs=1e-4)
    scored = single.score(CHATS, [["A"], [], ["A", "B"]])
    assert [len(scores) for scores in scored] == [1, 0, 2]


@pytest.mark.parametrize(
    "options", [{}, {"fuse_response": True}, {"rope": "removed"}, {"token_alignment": "reencode-longest"}]
)
def test_fused_scores_are_the_loss_that_trains(receiver, sharer, options):
    pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, **options)])
    encoder = Encoder.of(pair)
    prompts = PROMPTS[:-1] if pair.fuse_response else PROMPTS  # alone, one token is answered without a cache
    for prompt, texts, scores in zip(
        prompts, OPTIONS, Fused(pair).score(prompts, OPTIONS[: len(prompts)]), strict=False
    ):
        for text, score in zip(texts, scores, strict=True):
            with torch.no_grad():
                loss = response_loss(pair, collate([encoder.encode(Example(prompt, text, ends=False))]), num_items=1)
            assert score.log_likelihood == pytest.approx(-float(loss), abs=1e-4)


def test_several_sharers_are_scored_with(receiver, sharer):
    other = tiny_model("gemma2", seed=3)
    fusers = [tiny_fuser(receiver, sharer, fuse_response=True), tiny_fuser(receiver, other, fuse_response=True)]
    pair = CacheToCache(receiver, [sharer, other], fusers)
    both, first = Fused(pair).score(CHATS, OPTIONS[:3]), Fused(pair.select(0)).score(CHATS, OPTIONS[:3])
    assert all(
        close(scores, Fused(pair).score([prompt], [texts])[0])
        for prompt, texts, scores in zip(CHATS, OPTIONS, both, strict=False)
    )
    assert not any(close(two, one) for two, one in zip(both, first, strict=True))
