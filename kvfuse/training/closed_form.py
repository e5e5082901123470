"""Fit a fuser in closed form: both models read the examples once, and only sums over their tokens are kept."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import torch

from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import read_cache
from kvfuse.fusers import require_trainable
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import stack
from kvfuse.training.data.columns import EncodedExample, from_columns
from kvfuse.training.recipe import TrainSection

if TYPE_CHECKING:
    from datasets import Dataset


def fit(pair: CacheToCache, train: TrainSection, examples: "Dataset") -> None:
    """Fit the one fuser of a pair to the prompts of the examples.

    Args:
        pair: The models; the fuser is fitted in place.
        train: Gives ``batch_size``, and the number of batches in ``steps``; default: all examples once.
        examples: A data set of :func:`kvfuse.training.data.columns.to_columns`. Responses are not used: the fit
            compares the two models' caches, not what follows from them.

    Raises:
        PairError: The fuser is quantised, or there are too few examples.
    """
    require_trainable(pair.fusers[0])
    used = islice(examples, train.steps and train.steps * train.batch_size)
    pair.fusers[0].fit(read_pairs(pair, map(from_columns, used), train.batch_size))


@torch.no_grad()
def read_pairs(pair: CacheToCache, examples: Iterable[EncodedExample], batch_size: int) -> Iterator[tuple[KV, KV]]:
    """Compute the receiver's and the sharer's caches of the fused tokens, batch by batch, as the fuser will see them.

    Yields:
        ``(L_r, 1, H_r, N, D_r)`` and ``(L_s, 1, H_s, N, D_s)``.
    """
    unread = iter(examples)
    while batch := list(islice(unread, batch_size)):
        prompt = stack([example.prompt for example in batch])
        if prompt.ids.shape[1] < 2:  # the last token of a prompt is never fused
            continue
        caches = pair.read(prompt, 1)
        receiver, sharer = read_cache(caches.receiver), read_cache(caches.sharers[0])
        tokens = pair.select_tokens(prompt, receiver=receiver, sharer=sharer)
        if tokens is not None:
            yield tokens.receiver, tokens.sharer
