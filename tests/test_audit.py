"""The audit and its controls, on fusers whose answer is known: one that ignores the sharer, one that copies it."""

import numpy as np
import pytest
import torch
from answers import answers, run_of

from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import read_cache
from kvfuse.errors import MethodError
from kvfuse.evaluation.scoring.audit import table
from kvfuse.evaluation.scoring.metrics import metrics
from kvfuse.methods import make_method
from kvfuse.methods.audit import AdapterOnly, Deranged, Moments
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import stack
from kvfuse.testing import FAMILIES, tiny_fuser, tiny_model, tiny_tokenizer

QUESTIONS = [
    [{"role": "user", "content": text}]
    for text in ("What is Oslo?", "Which language?", "Who asks here?", "Two models read", "What is a capital?", "Why?")
]
OPTIONS = [["Oslo", "a capital"]] * len(QUESTIONS)
GREEDY = {"max_new_tokens": 6, "do_sample": False}
DERANGED = ("deranged-1", "deranged-2", "deranged-3")


@pytest.fixture
def deaf(receiver, sharer, request):
    """A pair whose fuser ignores the sharer."""
    fuse_response = getattr(request, "param", False)
    fuser = tiny_fuser(receiver, sharer, fuse_response=fuse_response)
    forward = fuser.forward
    fuser.forward = lambda *, receiver, sharer: forward(receiver=receiver, sharer=sharer.zeros_like())
    return CacheToCache(receiver, [sharer], [fuser])


def prepared(name, pair):
    method = make_method(name, pair)
    method.prepare(QUESTIONS)
    return method


def audited(scores):
    rows = [
        answers(name, values, seed=None if name in ("receiver", "sharer") else 0) for name, values in scores.items()
    ]
    return metrics(run_of(*rows))["tasks"]["t"]["audit"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_derangement_is_a_bijection_without_fixed_points(pair, seed):
    method = Deranged(pair, seed)
    method.prepare(QUESTIONS)
    donors = [str(method.donor(question)) for question in QUESTIONS]
    assert sorted(donors) == sorted(map(str, QUESTIONS))
    assert all(donor != str(question) for donor, question in zip(donors, QUESTIONS, strict=True))


def test_three_derangements_differ(pair):
    chosen = {tuple(str(prepared(name, pair).donor(question)) for question in QUESTIONS) for name in DERANGED}
    assert len(chosen) == 3


@pytest.mark.parametrize("deaf", [False, True], indirect=True, ids=["prompts", "responses"])
@pytest.mark.parametrize("name", [*DERANGED, "adapter-only", "moment-matched", "zeroed"])
def test_no_message_matters_to_a_fuser_that_ignores_the_sharer(deaf, name):
    matched, control = prepared("cache-to-cache", deaf), prepared(name, deaf)
    assert [reply.text for reply in control.reply(QUESTIONS, **GREEDY)] == [
        reply.text for reply in matched.reply(QUESTIONS, **GREEDY)
    ]
    scores = [
        [score.log_likelihood for options in method.score(QUESTIONS, OPTIONS) for score in options]
        for method in (matched, control)
    ]
    assert np.allclose(*scores, atol=1e-4)


@pytest.mark.parametrize("name", [*DERANGED, "adapter-only", "moment-matched"])
def test_messages_matter_to_other_fusers(pair, name):
    matched, control = make_method("cache-to-cache", pair), prepared(name, pair)
    assert [options[0].log_likelihood for options in matched.score(QUESTIONS, OPTIONS)] != [
        options[0].log_likelihood for options in control.score(QUESTIONS, OPTIONS)
    ]


def test_adapter_only_is_the_mean_of_five_fused_caches(pair):
    method = prepared("adapter-only", pair)
    batch = stack([method.align(question) for question in QUESTIONS])
    averaged = read_cache(method.fuse(QUESTIONS, batch).cache)
    donors = [Deranged(pair, seed) for seed in range(11, 16)]
    for each in donors:
        each.prepare(QUESTIONS)
    fused = [read_cache(pair.prefill([each.align(question) for question in QUESTIONS])) for each in donors]
    real = batch.mask[:, :-1].bool()
    expected = torch.stack([kv.key for kv in fused]).mean(0)
    assert torch.allclose(averaged.key.transpose(2, 3)[:, real], expected.transpose(2, 3)[:, real], atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "qwen3_next", "gpt2", "mpt"])
def test_the_controls_work_with_other_families(family):
    assert family in FAMILIES
    receiver, sharer = tiny_model(family), tiny_model("llama", tiny_tokenizer(300, "lines"))
    pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])
    for name in ("adapter-only", "moment-matched"):
        together = prepared(name, pair).score(QUESTIONS[:2], OPTIONS[:2])
        assert len(together) == 2
        assert len(prepared(name, pair).reply(QUESTIONS[:2], **GREEDY)) == 2


def test_noise_has_the_moments_of_the_sharers_cache():
    torch.manual_seed(0)
    mixing = torch.randn(2, 12, 12)
    tokens = torch.randn(2, 4000, 12) @ mixing + 3.0
    cache = KV(*(tokens.reshape(2, 4000, 3, 4).transpose(1, 2)[:, None] * scale for scale in (1.0, 0.1)))
    moments = Moments(cache.spec)
    for key, value in zip(cache.key.chunk(2, dim=3), cache.value.chunk(2, dim=3), strict=True):
        moments.add(KV(key, value))
    noise = moments.replace(cache, 0, 4000, torch.Generator().manual_seed(1))
    for part in ("key", "value"):
        real, drawn = (getattr(kv, part)[:, 0].transpose(1, 2).flatten(2) for kv in (cache, noise))
        spread = real.std()
        assert torch.allclose(real.mean(1), drawn.mean(1), atol=0.1 * spread)
        for layer in range(2):
            assert torch.allclose(real[layer].T.cov(), drawn[layer].T.cov(), atol=0.15 * spread**2)
        assert not torch.allclose(real, drawn, atol=0.1 * spread)


def test_the_run_is_needed_to_choose_donors(pair):
    for method in (Deranged(pair, 1), AdapterOnly(pair)):
        with pytest.raises(MethodError, match="call prepare with two or more"):
            method.reply(QUESTIONS[:1], **GREEDY)


def test_a_fuser_that_ignores_the_sharer_communicates_nothing():
    receiver, fused = np.tile([1, 0, 0, 0], 40), np.tile([1, 1, 1, 0], 40)
    same = dict.fromkeys(("cache-to-cache", "adapter-only", *DERANGED), fused)
    figures = audited({"receiver": receiver, "sharer": receiver, **same})
    assert figures["gain"]["difference"] == 0.5
    assert figures["pairing_gain"] == {"difference": 0, "interval": (0, 0)}
    assert figures["retained"]["share"] == 1
    assert "No communication can be shown" in figures["verdict"]
    assert "adapter-only keeps 100% of G" in figures["verdict"]


def test_all_that_a_fuser_gains_that_copies_the_answer_is_communication():
    receiver, fused = np.tile([1, 0, 0, 0], 40), np.tile([1, 1, 1, 1], 40)
    same = dict.fromkeys(("adapter-only", *DERANGED), receiver)
    figures = audited({"receiver": receiver, "sharer": fused, "cache-to-cache": fused, **same})
    assert figures["pairing_gain"] == figures["gain"]
    assert figures["harm"]["difference"] == 0
    assert figures["retained"]["share"] == 0
    assert figures["best"] == {"method": "sharer", "difference": 0, "interval": (0, 0)}
    assert figures["kept"]["receiver"]["share"] == 1
    assert "Communication is part of it" in figures["verdict"]
    assert "It is no better than the best of the others, sharer" in figures["verdict"]


def test_harm_counts_against_the_receiver():
    receiver, worse = np.tile([1, 1, 0, 0], 40), np.tile([1, 0, 0, 0], 40)
    figures = audited({"receiver": receiver, "cache-to-cache": receiver, **dict.fromkeys(DERANGED, worse)})
    assert figures["harm"]["difference"] == 0.25
    assert figures["pairing_gain"]["difference"] == 0.25
    assert "retained" not in figures
    assert dict(table(figures))["harm: receiver minus deranged"].startswith("+25.0")


def test_there_is_no_audit_without_a_derangement_nor_a_verdict_from_a_few():
    assert audited({"receiver": [1, 0], "cache-to-cache": [1, 1]}) is None
    assert (
        "No verdict from 2 items"
        in audited({"receiver": [1, 0], "cache-to-cache": [1, 1], "deranged-1": [1, 0]})["verdict"]
    )
