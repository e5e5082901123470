"""A prompt read through a CUDA graph is read as ever: it is filled up behind its end, and graphs are shared."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_kv_equal

from kvfuse.backends.cuda_graphs import MAX_GRAPH_TOKENS, MAX_GRAPHS, MIN_GRAPH_TOKENS, CudaGraphPrefill, graph_length
from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import copy_stacked, read_cache, supports_prefix_reuse
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import stack
from kvfuse.stages.prefill import prefill
from kvfuse.stages.prefix_store import PrefixStore
from kvfuse.testing import FAMILIES, tiny_fuser, tiny_model, tiny_tokenizer

TEXTS = ("What is the capital of Norway?", "Two models read the same question; one of them answers.", "Oslo")
GREEDY = {"max_new_tokens": 6, "do_sample": False}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def prompt_of(tokens, rows=1, seed=0):
    ids = torch.randint(5, 250, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return ids, torch.ones_like(ids), torch.arange(tokens).repeat(rows, 1)


def assert_same(got, expected):
    for mine, other in zip(read_cache(got).__dict__.values(), read_cache(expected).__dict__.values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_lengths_are_few_and_never_too_short():
    lengths = [graph_length(tokens) for tokens in range(1, MAX_GRAPH_TOKENS + 1)]
    assert all(
        tokens <= length <= max(MIN_GRAPH_TOKENS, 1.26 * tokens + 64) for tokens, length in enumerate(lengths, 1)
    )
    assert all(graph_length(length) == length for length in lengths)
    assert len(set(lengths)) <= MAX_GRAPHS


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_behind_a_prompt_does_not_change_its_cache(family):
    model = tiny_model(family).model
    if not supports_prefix_reuse(model):
        pytest.skip("is read as ever")
    ids, mask, positions = prompt_of(21)
    filled = torch.cat([ids, ids[:, :11]], 1), torch.ones(1, 32), torch.arange(32)[None]
    whole = read_cache(prefill(model, *filled))
    first = KV(whole.key[..., :21, :], whole.value[..., :21, :])
    assert_same(copy_stacked(model.config, first), prefill(model, ids, mask, positions))


def test_a_copy_side_by_side_is_read_on_from():
    model = tiny_model("gemma2").model
    ids, mask, positions = prompt_of(30)
    kv = read_cache(prefill(model, ids[:, :12], mask[:, :12], positions[:, :12]))
    copied = copy_stacked(model.config, kv)
    kv.key.zero_()
    assert_same(prefill(model, ids[:, 12:], mask, positions[:, 12:], copied), prefill(model, ids, mask, positions))
    assert read_cache(copied).key.data_ptr() == copied.layers[0].keys.data_ptr(), "the layers lie side by side"


def test_on_a_cpu_nothing_changes(pair):
    prompt = stack([pair.align(TEXTS[0])])
    expected = pair.answer(prompt, **GREEDY)
    assert pair.use_cuda_graphs() is pair
    assert torch.equal(pair.answer(prompt, **GREEDY), expected)
    assert pair.select(0).prefiller is pair.prefiller


@pytest.fixture
def on_gpu():
    """A pair on a GPU, and the same pair with prompts read through graphs."""
    receiver, sharer = tiny_model("qwen3"), tiny_model("llama", tiny_tokenizer(300, "lines"), seed=3)
    plain = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])
    for one in (receiver.model, sharer.model, *plain.fusers):
        one.to("cuda")
    return plain, CacheToCache(receiver, [sharer], plain.fusers).use_cuda_graphs()


@gpu
@torch.no_grad()
def test_graphs_are_used_again_for_other_tokens():
    model, captured = tiny_model("qwen3").model.to("cuda"), CudaGraphPrefill(prefill)
    for tokens, rows, seed in ((40, 1, 0), (64, 1, 1), (7, 1, 2), (65, 1, 3), (40, 2, 4), (40, 1, 5)):
        what = prompt_of(tokens, rows, seed)
        assert_same(captured(model, *what), prefill(model, *what))
    assert sorted(captured._recorded[model]) == [(1, 64), (1, 128), (2, 64)]


@gpu
@torch.no_grad()
def test_captured_answers_are_the_same(on_gpu):
    plain, captured = on_gpu
    kept = CacheToCache(plain.receiver, plain.sharers, plain.fusers, store=PrefixStore()).use_cuda_graphs()
    for _ in range(2):
        for text in TEXTS:
            expected = plain.generate(text, **GREEDY)
            assert torch.equal(captured.generate(text, **GREEDY), expected)
            assert torch.equal(kept.generate(text, **GREEDY), expected)
    assert kept.store.stats.hits
    assert torch.equal(captured.generate(list(TEXTS), **GREEDY), plain.generate(list(TEXTS), **GREEDY)), (
        "padding is read as ever"
    )


@gpu
def test_threads_share_graphs(on_gpu):
    plain, captured = on_gpu
    expected = [plain.generate(text, **GREEDY) for text in TEXTS]
    with ThreadPoolExecutor(3) as threads:
        got = list(threads.map(lambda text: captured.generate(text, **GREEDY), TEXTS * 8))
    assert all(torch.equal(one, other) for one, other in zip(got, expected * 8, strict=True))


@gpu
@torch.no_grad()
def test_what_is_read_is_the_callers_own():
    model, captured = tiny_model("qwen3").model.to("cuda"), CudaGraphPrefill(prefill)
    first = captured(model, *prompt_of(30))
    before = read_cache(first).clone()
    captured(model, *prompt_of(30, seed=1))
    assert_kv_equal(read_cache(first), before)
