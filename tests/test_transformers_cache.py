import pytest
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from kvfuse.cache.kv import KV, KVSpec
from kvfuse.cache.transformers_cache import CACHE, read_cache, read_only_cache, stage, write_cache
from kvfuse.errors import PairError
from kvfuse.prompts.alignment import count_positions
from kvfuse.stages.prefill import prefill, probe
from kvfuse.testing import FAMILIES, tiny_model

IDS = torch.arange(5, 30).view(1, -1)


def random_kv(layers=3, batch=2, heads=2, tokens=5, dim=4):
    return KV(*torch.randn(2, layers, batch, heads, tokens, dim))


@pytest.mark.parametrize("family", FAMILIES)
def test_read_keeps_every_position_and_write_gives_them_back(family):
    model = tiny_model(family).model
    cache = prefill(model, IDS, torch.ones_like(IDS), torch.arange(IDS.shape[1])[None])
    kv = read_cache(cache)
    assert kv.key.shape[3] == IDS.shape[1], "also in layers with a sliding window"
    again = write_cache(model.config, cache, kv)
    assert again.get_seq_length() == IDS.shape[1]
    plain = model(IDS).logits
    token = plain[:, -1:].argmax(-1)
    expected = model(torch.cat([IDS, token], 1)).logits[:, -1]
    torch.testing.assert_close(model(token, **{CACHE: again}).logits[:, -1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_read_only_cache_says_the_same_every_time(family):
    model = tiny_model(family).model
    cache = prefill(model, IDS, torch.ones_like(IDS), torch.arange(IDS.shape[1])[None])
    kv, new = read_cache(cache), torch.tensor([[7, 8, 9]])
    expected = model(new, **{CACHE: write_cache(model.config, cache, kv)}).logits
    for _ in range(2):
        got = model(new, use_cache=False, **{CACHE: read_only_cache(cache, kv)}).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    staged = read_only_cache(cache, kv)
    stage(staged, KV(*(part[..., :3, :] * 0 for part in (kv.key, kv.value))))
    assert not torch.allclose(model(new, use_cache=False, **{CACHE: staged}).logits, expected, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_reads_the_shape(family):
    config = tiny_model(family).model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers - (getattr(config, "layer_types", None) or []).count("linear_attention")
    heads = config.num_attention_heads if family in ("gpt2", "gpt_neox", "mpt") else config.num_key_value_heads
    assert probe(tiny_model(family).model) == KVSpec(layers, heads, dim, dim)


def test_a_model_without_a_kv_cache_is_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(PairError, match="KV-cache"):
        probe(model.eval())


def test_a_model_with_a_cache_of_its_own_is_refused():
    model = tiny_model("qwen2").model
    model.base_model.forward = lambda **inputs: (_ for _ in ()).throw(
        ValueError("only a cache of its own\nis compatible")
    )
    with pytest.raises(PairError, match="got Qwen2ForCausalLM: only a cache of its own; use another"):
        probe(model)


def test_layers_of_different_shapes_are_refused():
    cache = DynamicCache()
    for layer, heads in enumerate((2, 4)):
        cache.update(torch.zeros(1, heads, 3, 8), torch.zeros(1, heads, 3, 8), layer)
    with pytest.raises(PairError, match="one shape"):
        read_cache(cache)


def test_adding_tokens_undoes_picking_them():
    kv, rows, places = random_kv(), torch.tensor([0, 1, 1]), torch.tensor([4, 0, 3])
    doubled = kv.add_tokens(rows, places, kv.tokens(rows, places))
    picked = torch.zeros(2, 5, dtype=torch.bool)
    picked[rows, places] = True
    for before, after in ((kv.key, doubled.key), (kv.value, doubled.value)):
        scale = torch.where(picked, 2.0, 1.0)[None, :, None, :, None]
        assert torch.equal(after, before * scale)


def test_padding_does_not_shift_positions():
    assert count_positions(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_padded_keys_equal_those_without_padding():
    """Attention would hide a shift of RoPE, which is relative; a fuser sees it."""
    model = tiny_model("qwen3").model
    alone = read_cache(prefill(model, IDS, torch.ones_like(IDS), torch.arange(IDS.shape[1])[None]))
    padded_ids = torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(IDS)], 1)
    padded = read_cache(prefill(model, padded_ids, mask, count_positions(mask)))
    torch.testing.assert_close(padded.key[:, :, :, 4:], alone.key, rtol=1e-5, atol=1e-5)
