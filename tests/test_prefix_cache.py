"""A cache gives what begins alike, holds no more than it may, and forgets what was asked for longest ago."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfuse.cache.prefix_cache import MIN_REUSED_TOKENS, CachedText, PrefixCache, exact_text

IDS = st.lists(st.integers(0, 1), min_size=1, max_size=6)
WHERE = st.lists(st.integers(-1, 3), min_size=6, max_size=6)


def text_of(ids: list[int]) -> CachedText:
    return exact_text(torch.tensor([ids]), torch.arange(len(ids))[None])


def fused(ids, read, index):
    both = torch.tensor(read), torch.arange(len(read))
    return CachedText(text_of(ids).own, ((torch.stack(both), torch.tensor(index[: len(ids)])),))


def layers_of(tokens: int, value: float = 0.0):
    return [(torch.full((1, 1, tokens, 2), value), torch.full((1, 1, tokens, 2), value))]


@given(IDS, IDS)
def test_exact_caches_agree_as_far_as_the_ids_do(ids, others):
    same = [one == other for one, other in zip(ids, others, strict=False)]
    assert text_of(ids).common_prefix(text_of(others)) == [*same, False].index(False)


@given(IDS, WHERE, IDS, IDS, WHERE, IDS)
def test_fused_ones_only_where_the_sharer_read_the_same_too(ids, index, read, others, their_index, their_read):
    one, other = fused(ids, read, index), fused(others, their_read, their_index)
    known = text_of(read).common_prefix(text_of(their_read))
    same = [
        mine == theirs
        for mine, theirs in zip(zip(ids, index, strict=False), zip(others, their_index, strict=False), strict=False)
    ]
    expected = [alike and place < known for alike, place in zip(same, index, strict=False)]
    assert one.common_prefix(other) == other.common_prefix(one) == [*expected, False].index(False)


def test_what_begins_alike_for_longest_is_found_and_belongs_to_its_maker():
    cache, ids = PrefixCache(2**20), [3] * (2 * MIN_REUSED_TOKENS)
    for length in (MIN_REUSED_TOKENS, MIN_REUSED_TOKENS + 4):
        cache.put("me", text_of([*ids[:length], *[length] * 5]), layers_of(length + 5, float(length)))
    entry, known = cache.find("me", text_of(ids))
    assert (known, float(entry.layers[0][0][0, 0, 0, 0])) == (MIN_REUSED_TOKENS + 4, MIN_REUSED_TOKENS + 4)
    assert cache.find("you", text_of(ids)) == (None, 0)
    assert cache.find("me", text_of([4, *ids])) == (None, 0)
    assert cache.find("me", text_of([*ids[: MIN_REUSED_TOKENS - 1], 9, 9])) == (None, 0), "too little to be of use"


def test_a_copy_is_kept_in_place_of_its_beginnings():
    cache, layers = PrefixCache(2**20), layers_of(20)
    for length in (17, 20):
        cache.put("me", text_of([1] * length), layers)
    layers[0][0].fill_(7.0)
    (entry,) = cache.entries()
    assert (len(entry.text), float(entry.layers[0][0].sum())) == (20, 0.0)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=20), st.integers(1, 3))
def test_the_least_recently_used_leave(steps, room):
    """``room`` of five prompts of one size, kept or asked for in any order."""
    texts, size = [text_of([number] * MIN_REUSED_TOKENS) for number in range(5)], 2 * MIN_REUSED_TOKENS * 2 * 4
    cache, expected = PrefixCache(room * size), []
    for number, asks in steps:
        if asks:
            assert (cache.find("me", texts[number])[1] > 0) == (number in expected)
            expected = [*(one for one in expected if one != number), *([number] if number in expected else [])]
        else:
            cache.put("me", texts[number], layers_of(MIN_REUSED_TOKENS))
            expected = [*(one for one in expected if one != number), number][-room:]
        assert sorted(int(entry.text.own[0, 0]) for entry in cache.entries()) == sorted(expected)
        assert sum(entry.nbytes for entry in cache.entries()) <= room * size


def test_one_larger_than_the_cache_is_not_kept():
    cache = PrefixCache(10)
    cache.put("me", text_of([1] * MIN_REUSED_TOKENS), layers_of(MIN_REUSED_TOKENS))
    assert cache.entries() == []
