"""A cache with room holds what transformers' own would, whatever is done to it."""

import pytest
import torch
from transformers import DynamicCache

from kvfuse.cache import preallocated
from kvfuse.cache.preallocated import PreallocatedLayer, stacked_layers
from kvfuse.cache.transformers_cache import empty_cache, read_cache
from kvfuse.testing import tiny_model

LAYERS, SHAPE = 3, (2, 2, 5, 4)


@pytest.fixture(autouse=True)
def _little_room(monkeypatch):
    monkeypatch.setattr(preallocated, "SPARE_TOKENS", 3)


@pytest.fixture
def caches():
    """An empty one of ours, and transformers' own."""
    config = tiny_model("llama").model.config
    return empty_cache(config), DynamicCache(config=config)


def feed(caches, tokens, batch=2):
    for place in range(LAYERS):
        key, value = torch.randn(2, batch, SHAPE[1], tokens, SHAPE[3])
        for cache in caches:
            held = cache.update(key, value, place)
            assert torch.equal(held[0], cache.layers[place].keys)


def assert_alike(caches):
    ours, theirs = caches
    assert ours.get_seq_length() == theirs.get_seq_length()
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)


@pytest.mark.parametrize("change", ["nothing", "reorder", "repeat", "crop"])
def test_tokens_are_added_one_by_one(caches, change):
    feed(caches, 5)
    for step in range(12):
        feed(caches, 1, batch=4 if change == "repeat" and step > 6 else 2)
        for cache in caches if step == 6 else ():
            match change:
                case "reorder":
                    cache.reorder_cache(torch.tensor([1, 1]))
                case "repeat":
                    cache.batch_repeat_interleave(2)
                case "crop":
                    cache.crop(-9)
        assert_alike(caches)


def test_room_is_used(caches):
    feed(caches, 5)
    held = caches[0].layers[1].keys
    feed(caches, 2)
    assert caches[0].layers[1].keys.data_ptr() == held.data_ptr()
    feed(caches, 2)
    assert caches[0].layers[1].keys.data_ptr() != held.data_ptr()


def test_what_was_prefilled_lies_side_by_side_until_it_grows(caches):
    ours, _ = caches
    feed(caches, 5)
    kv = read_cache(ours)
    assert kv.key.shape == (LAYERS, *SHAPE)
    assert [kv.key[i].data_ptr() for i in range(LAYERS)] == [layer.keys.data_ptr() for layer in ours.layers]
    assert torch.equal(kv.value[1], ours.layers[1].values)
    feed(caches, 9)
    assert stacked_layers(ours.layers) is None
    assert all(layer.stack is None for layer in ours.layers), "what they left is freed"
    assert torch.equal(read_cache(ours).key[2], ours.layers[2].keys)


def test_layers_of_another_shape_have_a_place_of_their_own(caches):
    ours, _ = caches
    for place, dim in enumerate((4, 6, 4)):
        ours.update(*torch.randn(2, 1, 2, 5, dim), place)
    assert isinstance(ours.layers[1], PreallocatedLayer)
    assert ours.layers[1].keys.shape[-1] == 6
    assert stacked_layers(ours.layers) is None
