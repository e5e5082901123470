"""A folded fuser says what it said before, in fewer steps."""

import pytest
import torch
from helpers import Dispatched, assert_kv_close, assert_same_tensors, random_kv

from kvfuse.errors import PairError
from kvfuse.fusers import quantize
from kvfuse.fusers.execution import feed_forward
from kvfuse.fusers.execution.fold_norms import FoldedRMSNorm, fold_norms
from kvfuse.fusers.layers import GroupedRMSNorm
from kvfuse.testing import tiny_fuser

QUESTION = "What is the capital of Norway?"
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def with_norms(fuser):
    for part in fuser.requires_grad_(False).modules():
        if isinstance(part, GroupedRMSNorm):
            part.weight.uniform_(0.5, 2)
    return fuser


@pytest.mark.parametrize("kind", ["c2c", "low-rank", "c2c-complex"])
@pytest.mark.parametrize("budget", [0, 2**40], ids=["lanes", "at once"])
def test_a_folded_fuser_computes_the_same(receiver, sharer, kind, budget, monkeypatch):
    monkeypatch.setattr(feed_forward, "CACHE_BYTES", budget)
    fuser = with_norms(tiny_fuser(receiver, sharer, kind))
    fuser.gate.logit[1] = -1.0
    inputs = random_kv(receiver.kv_spec, tokens=9), random_kv(sharer.kv_spec, tokens=9)
    expected = fuser(receiver=inputs[0], sharer=inputs[1])
    fold_norms(fuser)
    fold_norms(fuser)  # once more changes nothing
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_kv_close(fuser(receiver=inputs[0], sharer=inputs[1]), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_it_takes_fewer_steps(receiver, sharer):
    fuser = with_norms(tiny_fuser(receiver, sharer))
    inputs = random_kv(receiver.kv_spec, tokens=9), random_kv(sharer.kv_spec, tokens=9)
    steps = []
    for _ in range(2):
        with Dispatched() as seen:
            fuser(receiver=inputs[0], sharer=inputs[1])
        steps.append(len(seen.names))
        fold_norms(fuser)
    assert steps[1] == steps[0] - 3, "one for each norm"


def test_quantised_products_stay_as_they_are(receiver, sharer):
    small = quantize(with_norms(tiny_fuser(receiver, sharer)), "int8")
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    fold_norms(small)
    assert_same_tensors(small.state_dict(), before)


def test_a_pair_is_folded_and_its_fuser_not_saved(pair, tmp_path):
    said = pair.generate(QUESTION, **GREEDY)
    assert pair.fold_norms() is pair
    assert any(isinstance(part, FoldedRMSNorm) for part in pair.fusers[0].modules())
    assert torch.equal(pair.generate(QUESTION, **GREEDY), said)
    with pytest.raises(PairError, match="load it again"):
        pair.fusers[0].save_pretrained(tmp_path)
