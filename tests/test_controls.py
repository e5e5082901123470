"""Controls take one thing away from Cache-to-Cache, and nothing else."""

import json

import numpy as np
import pytest
import torch

from kvfuse.cache.transformers_cache import read_cache
from kvfuse.errors import MethodError
from kvfuse.methods import Fused, Mismatched, ProjectedOnly, RandomFuser, Shuffled, Single, Zeroed
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import stack
from kvfuse.testing import tiny_fuser, tiny_model

TEXTS = ("What is the capital of Norway?", "Two models read", "hi", "Which language do people speak there?")
PROMPTS = [[{"role": "user", "content": text}] for text in TEXTS]
OPTIONS = {"max_new_tokens": 5, "do_sample": False}


def pair_of(pair, **options):
    return CacheToCache(
        pair.receiver, pair.sharers, [tiny_fuser(pair.receiver, one, **options) for one in pair.sharers]
    )


def texts(method, prompts=PROMPTS):
    return [answer.text for answer in method.generate(prompts, **OPTIONS)]


def fused_and_clean(method, prompts=PROMPTS):
    """The cache that a method answers from, the receiver's own, and which positions are fused."""
    prompt = stack([method.align(prompt) for prompt in prompts])
    with torch.no_grad():
        fused, clean = (read_cache(method.pair.prefill(prompt, fusers=fusers)) for fusers in (method.fusers, []))
    return fused, clean, prompt.fuse_mask[:, :-1] & (prompt.sharers[0].index[:, :-1] >= 0)


@pytest.mark.parametrize(
    "control", [Zeroed, Shuffled, RandomFuser, lambda pair: Mismatched(pair, lambda _: PROMPTS[0])]
)
def test_closed_gates_leave_the_receiver_alone(pair, control):
    assert texts(control(pair_of(pair, gate_init=-1.0))) == texts(Single("receiver", pair.receiver))


@pytest.mark.parametrize("control", [Zeroed, Shuffled, RandomFuser, ProjectedOnly])
def test_each_control_fuses_something_else_in_the_same_places(pair, control):
    (fused, clean, where), (other, _, elsewhere) = fused_and_clean(Fused(pair)), fused_and_clean(control(pair))
    assert torch.equal(where, elsewhere)
    differs = (fused.key - other.key).abs().amax((0, 2, 4)) > 1e-4
    assert not differs[~where].any()
    assert differs[where].float().mean() > 0.9
    assert torch.equal(other.value.transpose(2, 3)[:, ~where], clean.value.transpose(2, 3)[:, ~where])


@pytest.mark.parametrize("options", [{}, {"rope": "removed"}])
def test_projected_only_leaves_nothing_but_the_residual(pair, options):
    pair = pair_of(pair, **options)
    (fused, clean, where), (projected, _, _) = fused_and_clean(Fused(pair)), fused_and_clean(ProjectedOnly(pair))
    for ours, own, alone in ((fused.key, clean.key, projected.key), (fused.value, clean.value, projected.value)):
        ours, own, alone = (part.transpose(2, 3)[:, where] for part in (ours, own, alone))
        torch.testing.assert_close(alone, ours - own, atol=1e-4, rtol=1e-4)


def test_without_the_receiver_several_residuals_add_up(pair):
    other = tiny_model("gemma2", seed=3)
    fusers = [tiny_fuser(pair.receiver, one, seed=seed) for seed, one in enumerate([*pair.sharers, other])]
    both = CacheToCache(pair.receiver, [*pair.sharers, other], fusers)
    (fused, clean, where), (projected, _, _) = fused_and_clean(Fused(both)), fused_and_clean(ProjectedOnly(both))
    ours, own, alone = (part.value.transpose(2, 3)[:, where] for part in (fused, clean, projected))
    torch.testing.assert_close(alone, ours - own, atol=1e-4, rtol=1e-4)


def test_a_shuffled_sharer_is_read_everywhere_but_in_place(pair):
    method = Shuffled(pair)
    for prompt in PROMPTS:
        plain, shuffled = (aligned.sharers[0][1] for aligned in (pair.align(prompt), method.align(prompt)))
        assert np.array_equal(plain < 0, shuffled < 0)
        assert not (plain == shuffled)[plain >= 0].any()
        assert len(set(plain[plain >= 0])) == len(set(shuffled[shuffled >= 0]))
        assert np.array_equal(shuffled, method.align(prompt).sharers[0][1])
        assert not np.array_equal(shuffled, Shuffled(pair, seed=1).align(prompt).sharers[0][1])


@pytest.mark.parametrize("kind", ["c2c", "low-rank"])
def test_a_random_fuser_has_other_weights_and_the_same_gates(pair, kind):
    trained = tiny_fuser(pair.receiver, pair.sharers[0], kind, gate_init=0.0, zero_init=True)
    for logit in trained.gate_parameters():
        logit.data[::2] = 1.0
    pair = CacheToCache(pair.receiver, pair.sharers, [trained])
    (drawn,), state = RandomFuser(pair).fusers, torch.random.get_rng_state()
    (again,), (other,) = RandomFuser(pair).fusers, RandomFuser(pair, seed=1).fusers
    assert torch.equal(state, torch.random.get_rng_state())
    for name, gates in trained.open_gates().items():
        assert torch.equal(gates, drawn.open_gates()[name])
    weights, same, others = (torch.cat([part.flatten() for part in one.parameters()]) for one in (drawn, again, other))
    assert torch.equal(weights, same)
    assert not torch.equal(weights, others)
    assert texts(Fused(pair)) == texts(Single("receiver", pair.receiver)) != texts(RandomFuser(pair))


def test_a_mismatched_sharer_reads_another_prompt_of_like_length(pair):
    method = Mismatched(pair)
    method.prepare([PROMPTS[0], PROMPTS[0], *PROMPTS[1:]])
    by_length = sorted(PROMPTS, key=lambda prompt: len(json.dumps(prompt)))
    by_hand = Mismatched(pair, lambda prompt: by_length[(by_length.index(prompt) + 1) % len(by_length)])
    for prompt in PROMPTS:
        assert method.align(prompt).sharers[0][0].ids.tolist() == by_hand.align(prompt).sharers[0][0].ids.tolist()
    assert texts(method) == texts(by_hand) != texts(Fused(pair))


@pytest.mark.parametrize("run", [[], PROMPTS[:1] * 2, PROMPTS[1:]])
def test_a_prompt_without_a_donor_is_refused(pair, run):
    method = Mismatched(pair)
    method.prepare(run)
    with pytest.raises(MethodError, match="two or more"):
        method.reply(PROMPTS[:1], **OPTIONS)


def test_a_donor_that_is_the_prompt_itself_mismatches_nothing(pair):
    assert texts(Mismatched(pair, lambda prompt: prompt)) == texts(Fused(pair))
