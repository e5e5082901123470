"""Packed weights say what they said before."""

import pytest
import torch
from test_fusers import random_kv

from kvfuse import packed
from kvfuse.errors import PairError
from kvfuse.fusers import lanes
from kvfuse.fusers.grouped import GroupedRMSNorm
from kvfuse.kv_cache import read_cache
from kvfuse.model import CacheToCache
from kvfuse.packed import PackedGroups, PackedLinear, pack
from kvfuse.testing import tiny_fuser, tiny_model, tiny_tokenizer
from kvfuse.token_alignment import stack

QUESTION = [{"role": "user", "content": "What is the capital of Norway?"}]
GREEDY = {"max_new_tokens": 6, "do_sample": False}
OPTIONS = [{}, {"kind": "low-rank"}, {"kind": "c2c-complex"}, {"family": "gpt_neox"}, {"fuse_response": True}]

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch is built without oneDNN")


@pytest.fixture(autouse=True)
def _quicker(monkeypatch):
    monkeypatch.setattr(packed, "is_quicker", lambda: True)


def new_pair(family="qwen3", kind="c2c", **options):
    receiver, sharer = tiny_model(family, tie_word_embeddings=True), tiny_model("qwen2", tiny_tokenizer(300, "lines"), seed=3)
    return CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, kind, **options)])


@pytest.mark.parametrize("budget", [0, 2**40], ids=["lanes", "at once"])
@pytest.mark.parametrize(
    "options", [{}, {"kind": "low-rank"}, {"kind": "c2c-complex"}, {"family": "gpt_neox"}, {"fuse_response": True}], ids=str
)
@torch.no_grad()
def test_a_packed_pair_answers_as_before(options, budget, monkeypatch):
    monkeypatch.setattr(lanes, "CACHED_BYTES", budget)
    pair = new_pair(**options)
    pair.fusers[0].gate.logit[1] = -1.0
    prompt = stack([pair.align(QUESTION)])
    expected, said = read_cache(pair.prefill(prompt)), pair.generate([QUESTION], **GREEDY)
    size = sum(one.numel() for one in pair.receiver.model.parameters())
    assert pair.pack() is pair
    got = read_cache(pair.prefill(prompt))
    torch.testing.assert_close(got.key, expected.key, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.value, expected.value, rtol=1e-4, atol=1e-5)
    assert torch.equal(pair.generate([QUESTION], **GREEDY), said)
    assert any(isinstance(part, PackedLinear) for part in pair.receiver.model.modules())
    assert any(isinstance(part, PackedGroups) for part in pair.fusers[0].modules())
    assert sum(one.numel() for one in pair.receiver.model.parameters()) < size, "their own weights are gone"


def test_what_is_shared_with_the_embedding_stays():
    model = tiny_model("qwen3", tie_word_embeddings=True).model
    pack(model)
    assert type(model.lm_head) is torch.nn.Linear


def test_weights_come_back_and_gradients_flow_to_inputs():
    pair = new_pair()
    before = {name: part.weight.clone() for name, part in pair.fusers[0].named_modules() if hasattr(part, "weight")}
    pair.pack()
    for name, part in pair.fusers[0].named_modules():
        if isinstance(part, PackedGroups):
            assert torch.equal(part.weight, before[name])
            x = torch.randn(len(part.packed), 3, before[name].shape[1], requires_grad=True)
            part(x).sum().backward()
            torch.testing.assert_close(x.grad, before[name].sum(-1)[:, None].expand_as(x))


@pytest.mark.parametrize("kind", ["c2c", "low-rank", "c2c-complex"])
def test_norms_lose_their_weights_on_every_device(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(packed, "is_quicker", lambda: False)
    receiver, sharer = tiny_model("qwen3"), tiny_model("llama")
    fuser = tiny_fuser(receiver, sharer, kind).requires_grad_(False)
    norms = [part for part in fuser.modules() if isinstance(part, GroupedRMSNorm)]
    for norm in norms:
        norm.weight.uniform_(0.5, 2)
    inputs = random_kv(receiver.kv_spec, tokens=9), random_kv(sharer.kv_spec, tokens=9)
    expected = fuser(*inputs)
    pack(fuser)
    pack(fuser)  # once more changes nothing
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(fuser(*inputs).key, expected.key, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(fuser(*inputs).value, expected.value, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(part, GroupedRMSNorm) for part in fuser.modules())
    if norms:
        with pytest.raises(PairError, match="load it again"):
            fuser.save_pretrained(tmp_path)


def test_packed_models_and_fusers_are_not_saved(tmp_path):
    pair = new_pair().pack()
    for one in (pair.fusers[0], pair.receiver.model):
        with pytest.raises(PairError, match="load it again"):
            one.save_pretrained(tmp_path)


def test_nothing_is_packed_where_it_is_not_quicker_or_not_float32(monkeypatch):
    half = tiny_model("qwen3").model.to(torch.bfloat16)
    pack(half)
    monkeypatch.setattr(packed, "is_quicker", lambda: False)
    whole = tiny_model("qwen3").model
    pack(whole)
    assert not any(isinstance(part, PackedLinear) for model in (half, whole) for part in model.modules())
