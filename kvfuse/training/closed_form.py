"""Fit a fuser in closed form: both models read the examples once, and only sums over their tokens are kept."""

from collections.abc import Iterator, Sequence

import torch

from kvfuse.fuse import pick
from kvfuse.kv_cache import KV, read_cache
from kvfuse.model import CacheToCache
from kvfuse.token_alignment import stack
from kvfuse.training.data import EncodedExample
from kvfuse.training.recipe import TrainSection


def fit(pair: CacheToCache, train: TrainSection, examples: Sequence[EncodedExample]) -> None:
    """Fit the one fuser of a pair to the prompts of the examples.

    Args:
        pair: The models; their fuser is fitted in place.
        train: ``batch_size`` and ``steps`` say how many examples are read at once and how often; once through by default.
        examples: Their responses are not read: the caches of two models are compared, not what follows from them.
    """
    pair.fusers[0].fit(read_pairs(pair, examples[: train.steps and train.steps * train.batch_size], train.batch_size))


@torch.no_grad()
def read_pairs(pair: CacheToCache, examples: Sequence[EncodedExample], batch_size: int) -> Iterator[tuple[KV, KV]]:
    """The receiver's and the sharer's caches of the tokens that are fused, batch by batch, as the fuser will see them.

    Yields:
        ``(L_r, 1, H_r, N, D_r)`` and ``(L_s, 1, H_s, N, D_s)``.
    """
    weight = next(pair.fusers[0].parameters())
    for start in range(0, len(examples), batch_size):
        prompt = stack([example.prompt for example in examples[start : start + batch_size]])
        if prompt.ids.shape[1] < 2:
            continue
        streams = pair.read(prompt)
        picked = pick(read_cache(streams.receiver), read_cache(streams.sharers[0]), prompt, 0, weight, pair.rotations)
        if picked is not None:
            yield picked.receiver, picked.sharer
