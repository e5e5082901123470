"""What the hardware reaches in this very run, what a fuser asks of it, and so how quick a fuser could be at best."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rows import Row, row
from benchmarks.timing import timed
from kvfuse.fusers import Fuser
from kvfuse.fusers.layers import GroupedLinear
from kvfuse.language_model import LanguageModel
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt

SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
COPIED, TRIES = 2**28, 5  # bytes: more than any cache holds


@dataclass(frozen=True)
class Work:
    """What fusing asks for at least.

    Attributes:
        flops: Of the matrix products alone.
        bytes: Weights once, the caches read, the receiver's written.
    """

    flops: float
    bytes: float

    @classmethod
    def of_fusing(cls, pair: CacheToCache, prompt: AlignedPrompt) -> Self:
        """One fuse of a batch by the pair's first fuser."""
        tokens = prompt.ids.numel() - len(prompt.ids)  # the last of each row is not fused
        mine, theirs = token_bytes(pair.receiver), token_bytes(pair.sharers[0])
        moved = parameter_bytes(pair.fusers[0]) + tokens * 2 * mine + prompt.sharers[0].ids.numel() * theirs
        return cls(sum(2 * tokens * weight.numel() for weight in grouped_weights(pair.fusers[0])), moved)


@dataclass(frozen=True)
class Machine:
    """What it reached at best.

    Attributes:
        flops: In matrix products, a second.
        bandwidth: In a copy, bytes read and written a second.
    """

    flops: float
    bandwidth: float

    @classmethod
    def measured(cls, like: Tensor) -> Self:
        """On a tensor's device, in its dtype."""
        products = [found for side in SIDES[like.device.type] for found in _products(like, side)]
        copied = like.new_empty(COPIED // like.itemsize).zero_()
        kept = torch.empty_like(copied)
        seconds = min(timed(kept.copy_, copied) for _ in range(TRIES))
        return cls(max(_speed(*product) for product in products), 2 * copied.nbytes / seconds)

    def seconds(self, work: Work) -> float:
        """The least that the work takes: arithmetic or transport, whichever is slower."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)

    def rows(self, setting: str) -> Iterator[Row]:
        """What was reached."""
        yield row("largest rate of matrix products", setting, self.flops / 1e9, None, "GFLOP/s")
        yield row("largest rate of a copy", setting, self.bandwidth / 1e9, None, "GB/s")


def grouped_weights(fuser: Fuser) -> list[Tensor]:
    """``(G, in, out)`` each: the parameters that multiply every token, in the order of the fuser's parts."""
    return [part.weight for part in fuser.modules() if isinstance(part, GroupedLinear)]


def parameter_bytes(module: torch.nn.Module) -> int:
    """Of all parameters and buffers; tied ones count once."""
    return sum(tensor.nbytes for tensor in chain(module.parameters(), module.buffers()))


def token_bytes(model: LanguageModel) -> int:
    """Of one token's keys and values in all layers."""
    spec = model.kv_spec
    return spec.num_layers * spec.num_kv_heads * (spec.key_dim + spec.value_dim) * model.model.dtype.itemsize


def _products(like: Tensor, side: int) -> Iterator[tuple[Callable[..., Any], Tensor, Tensor]]:
    """A few that libraries are good at: square, and a batch of prompts' shape."""
    yield F.linear, torch.randn(side, side).to(like), torch.randn(side, side).to(like)
    yield F.linear, torch.randn(256, side).to(like), torch.randn(side, side).to(like)
    yield torch.bmm, torch.randn(8, 256, side).to(like), torch.randn(8, side, side).to(like)


def _speed(multiply: Callable[..., Any], x: Tensor, weight: Tensor) -> float:
    seconds = min(timed(multiply, x, weight) for _ in range(TRIES))
    return 2 * x.numel() * weight.shape[-1] / seconds
