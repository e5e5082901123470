"""Fusing in place or in pieces gives the same cache as fusing at once."""

import pytest
import torch
from helpers import assert_kv_close, assert_kv_equal

from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import read_cache
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import stack
from kvfuse.stages import fuse as fuse_module
from kvfuse.stages.fuse import FUSIONS, fuse
from kvfuse.testing import tiny_fuser, tiny_model

PROMPTS = ["What is the capital of Norway?", "Two models read", "Which language do people speak in Rotterdam?"]


@pytest.fixture(params=[(FUSIONS[0], "kept"), (FUSIONS[0], "removed"), (FUSIONS[1], "kept")], ids=str)
def pair(request, receiver, sharer):
    fusion, rope = request.param
    others = [sharer, tiny_model("llama", seed=4)]
    return CacheToCache(receiver, others, [tiny_fuser(receiver, one, rope=rope) for one in others], fusion)


@pytest.fixture(params=[1, 3])
def read(request, pair):
    prompt = stack([pair.align(prompt) for prompt in PROMPTS[: request.param]])
    with torch.no_grad():
        streams = pair.read(prompt)
    return prompt, read_cache(streams.receiver), list(map(read_cache, streams.sharers))


def fused(pair, read, **options):
    prompt, receiver, sharers = read
    options |= {"fusion": pair.fusion, "ropes": pair.ropes}
    return fuse(receiver=receiver, sharers=sharers, fusers=pair.fusers, prompt=prompt, **options)


@pytest.mark.parametrize("tokens", [1, 7, 1024])
def test_pieces_equal_the_whole(pair, read, tokens, monkeypatch):
    expected = fused(pair, read)  # with gradients, at once
    assert not torch.equal(expected.key, read[1].key)
    monkeypatch.setattr(fuse_module, "TOKENS_PER_CHUNK", tokens)
    before = read[1].clone()
    with torch.no_grad():
        assert_kv_close(fused(pair, read), expected)
        assert_kv_equal(read[1], before)  # written to only where that is asked for
        got = fused(pair, read, consume=True)
    assert_kv_close(got, expected)
    assert got.key.data_ptr() == read[1].key.data_ptr()


def test_streams_are_left_alone_unless_they_are_used_up(pair):
    prompt = stack([pair.align(PROMPTS[0])])
    with torch.no_grad():
        streams = pair.read(prompt)
        clean = read_cache(streams.receiver).clone()
        expected = read_cache(pair.fuse(prompt, caches=streams).cache)
        assert_kv_equal(read_cache(streams.receiver), clean)
        taken = pair.fuse(prompt, caches=streams, consume=True).cache
    assert_kv_close(read_cache(taken), expected)
    assert taken.layers[1] is streams.receiver.layers[1], "no copy is made"


def test_tokens_of_one_stretch_are_not_copied():
    kv = KV(*torch.randn(2, 3, 2, 2, 6, 4))
    rows, places = torch.ones(3, dtype=torch.long), torch.tensor([2, 3, 4])
    assert kv.tokens(rows, places).key.data_ptr() == kv.key[:, 1, :, 2].data_ptr()
    apart = torch.tensor([2, 4, 3])
    assert torch.equal(kv.tokens(rows, apart).key, kv.key[:, 1:2, :, apart])
    for some in (places, apart):
        expected = kv.add_tokens(rows, some, kv.tokens(rows, some))
        got = kv.clone()
        got.add_tokens_(rows, some, kv.tokens(rows, some))
        assert_kv_equal(got, expected)
