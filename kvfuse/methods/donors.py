"""Donors: for each prompt of a run, the other prompt that a mismatched sharer reads in its place."""

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def choose_donors(
    pool: Sequence[T],
    *,
    seed: int | None = 0,
    key: Callable[[T], Any] | None = None,
    accept: Callable[[T, T], bool] = lambda item, donor: True,
) -> list[int | None]:
    """Returns the index of each item's donor: the next acceptable item on one fixed ring through the pool.

    Where every donor is accepted, that is the next item: a derangement, i.e. a bijection without fixed points. Each
    item is then the donor of exactly one other, so matched and mismatched runs read the same inputs equally often, and
    their difference is due to the pairing (Draft-KV, https://arxiv.org/abs/2609.34754, defines its pairing gain so).

    Example: the ring b -> d -> a -> c -> b gives the donors ``[2, 3, 1, 0]`` for the pool ``[a, b, c, d]``.

    Args:
        pool: All items of a run, each once.
        seed: Of the ring's random order; None: the order of the pool.
        key: Sorts the ring, ties staying in that order. With the length as key, donors are of similar length.
        accept: Whether ``donor`` may stand in for ``item``; what it refuses is skipped on the way round the ring.

    Returns:
        None for an item without an acceptable donor, such as the only item of a pool.
    """
    count = len(pool)
    # 1) the ring: random, then sorted by the key (a stable sort)
    ring = list(range(count)) if seed is None else random.Random(seed).sample(range(count), count)
    if key is not None:
        ring.sort(key=lambda index: key(pool[index]))
    # 2) walk on from each item, once around, to the first acceptable one
    donors: list[int | None] = [None] * count
    for position, index in enumerate(ring):
        others = (ring[(position + step) % count] for step in range(1, count))
        donors[index] = next((other for other in others if accept(pool[index], pool[other])), None)
    return donors
