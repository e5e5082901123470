"""Donors are one fixed ring through the pool."""

import pytest

from kvfuse.methods.donors import choose_donors


@pytest.mark.parametrize("count", [2, 3, 50])
@pytest.mark.parametrize("options", [{}, {"seed": 7}, {"seed": None}, {"key": lambda item: item % 3}])
def test_donors_are_a_derangement(count, options):
    pool = [item * item for item in range(count)]
    donors = choose_donors(pool, **options)
    assert sorted(donors) == list(range(count)), "each item is the donor of exactly one other"
    assert all(donor != index for index, donor in enumerate(donors))
    assert donors == choose_donors(pool, **options), "the same in every run"


def test_all_items_are_on_a_single_ring():
    donors, index, visited = choose_donors(list(range(20))), 0, []
    for _ in range(20):
        visited.append(index)
        index = donors[index]
    assert index == 0
    assert len(set(visited)) == 20


def test_without_a_seed_the_next_item_is_the_donor():
    assert choose_donors("abcd", seed=None) == [1, 2, 3, 0]


def test_the_ring_is_sorted_by_the_key_in_random_order_within_a_tie():
    pool = ["ccc", "a", "bb", "d"]
    short, long = (choose_donors(pool, key=len, seed=seed) for seed in (0, 1))
    for donors in (short, long):
        assert donors[0] in (1, 3), "after the longest the ring begins again"
        assert donors[2] == 0
    rings = {tuple(choose_donors(pool, key=len, seed=seed)) for seed in range(10)}
    assert rings == {(1, 3, 0, 2), (3, 2, 0, 1)}


def test_donors_that_are_not_accepted_are_skipped():
    pool = ["a1", "a2", "b1", "b2", "a3"]
    donors = choose_donors(pool, seed=None, accept=lambda item, donor: item[0] == donor[0])
    assert donors == [1, 4, 3, 2, 0]
    assert choose_donors(pool, seed=None, accept=lambda item, donor: item[0] != donor[0]) == [2, 2, 4, 4, 2]


def test_an_item_without_a_donor_has_none():
    assert choose_donors(["alone"]) == [None]
    assert choose_donors([]) == []
    assert choose_donors("ab", accept=lambda item, donor: item == "a") == [1, None]
