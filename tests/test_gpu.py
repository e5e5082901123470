"""On a GPU a fuser computes what it computes on a CPU, and waits for nothing."""

import copy

import pytest
import torch
from helpers import assert_kv_close, inputs_of, random_kv
from torch.profiler import ProfilerActivity, profile

from kvfuse.cache.kv import KV
from kvfuse.fusers import FUSERS, quantize
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import stack
from kvfuse.testing import tiny_fuser, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OPTIONS = [{"gate": "head"}, {"gate": "none"}, {"parts": "values"}, {"replace": True}, {"layer_alignment": [0, 2, 3]}]
QUESTION = "What is the capital of Norway?"
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def moved(kv, device="cuda"):
    return KV(kv.key.to(device), kv.value.to(device))


def assert_close(got, expected):
    assert_kv_close(moved(got, "cpu"), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=[{"kind": kind} for kind in FUSERS] + OPTIONS, ids=str)
def fuser(request, receiver, sharer):
    return tiny_fuser(receiver, sharer, **request.param)


@pytest.fixture
def inputs(fuser):
    return inputs_of(fuser, tokens=9)


@pytest.mark.parametrize("closed", [[], [1], [0, 2]])
@torch.no_grad()
def test_residuals_are_those_of_a_cpu(fuser, inputs, closed):
    if fuser.gate is not None:
        fuser.gate.logit[closed] = -1.0
    expected = fuser(receiver=inputs[0], sharer=inputs[1])
    there = copy.deepcopy(fuser).to("cuda")
    assert_close(there(receiver=moved(inputs[0]), sharer=moved(inputs[1])), expected)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@torch.no_grad()
def test_quantized_residuals_are_close_to_those_of_a_cpu(receiver, sharer, weights):
    small = quantize(tiny_fuser(receiver, sharer), weights)
    inputs = random_kv(receiver.kv_spec, tokens=9), random_kv(sharer.kv_spec, tokens=9)
    expected = small(receiver=inputs[0], sharer=inputs[1])
    got = copy.deepcopy(small).to("cuda")(receiver=moved(inputs[0]), sharer=moved(inputs[1]))
    assert float((got.key.cpu() - expected.key).norm() / expected.key.norm()) < 0.03, "a CPU rounds tokens as well"


def test_gradients_are_those_of_a_cpu(receiver, sharer):
    fuser = tiny_fuser(receiver, sharer)
    inputs = random_kv(receiver.kv_spec, tokens=9), random_kv(sharer.kv_spec, tokens=9)
    there = copy.deepcopy(fuser).to("cuda")
    for one, kvs in ((fuser, inputs), (there, tuple(map(moved, inputs)))):
        residual = one(receiver=kvs[0], sharer=kvs[1])
        (residual.key.square().sum() + residual.value.square().sum()).backward()
    for mine, other in zip(there.parameters(), fuser.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_answers_are_those_of_a_cpu_and_fusing_waits_for_nothing():
    receiver, sharer = (
        tiny_model("qwen3"),
        tiny_model("llama", tiny_tokenizer(300, "lines"), seed=3, num_hidden_layers=2),
    )
    pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])
    expected = pair.generate(QUESTION, **GREEDY)
    for one in (receiver.model, sharer.model, *pair.fusers):
        one.to("cuda")
    for _ in range(4):
        assert torch.equal(pair.generate(QUESTION, **GREEDY).cpu(), expected)
    alike = CacheToCache(receiver, [receiver], [tiny_fuser(receiver, receiver).to("cuda")])
    prompt = stack([alike.align(QUESTION)])
    alike.prefill(prompt)
    streams = alike.read(prompt)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        alike.fuse(prompt, caches=streams, consume=True)
        torch.cuda.synchronize()
    names = [event.name for event in seen.events()]
    assert not [name for name in names if "Memcpy DtoH" in name or "Memcpy HtoD" in name]
    assert sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in names) < 40


@torch.no_grad()
def test_products_of_weights_follow_the_weights(receiver, sharer):
    """A product of two weights is computed again when either changes, for all groups or a subset."""
    fuser = tiny_fuser(receiver, sharer).to("cuda")
    inputs = moved(random_kv(receiver.kv_spec, tokens=9)), moved(random_kv(sharer.kv_spec, tokens=9))
    for closed in ([], [1], [0, 2]):
        for name in ("w2", "norm", "w1"):
            fuser.gate.logit.fill_(1.0)
            fuser.gate.logit[closed] = -1.0
            getattr(fuser.weighting, name).weight.mul_(1.5)
            apart = copy.deepcopy(fuser).to("cpu")
            expected = apart(receiver=moved(inputs[0], "cpu"), sharer=moved(inputs[1], "cpu"))
            assert_close(fuser(receiver=inputs[0], sharer=inputs[1]), expected)
