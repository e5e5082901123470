"""The embedded pair: two tiny models that know different facts, and the fusers between them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfuse.model import CacheToCache


def load_pair(seed: int = 0) -> "CacheToCache":
    """Returns the shipped pair with the fuser of a training seed, in milliseconds and without a download."""
    from kvfuse.demo.pair_folder import PairFolder

    return PairFolder().fused(seed)
