"""Peak speeds of the hardware, measured in this very run, the work of a fuse, and so its least possible time."""

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
COPIED_BYTES, TRIES = 2**28, 5


@dataclass(frozen=True)
class Work:
    """The least work of a fuse.

    Attributes:
        flops: Of the matrix products only.
        bytes: Weights once, the caches read, the receiver's written.
    """

    flops: float
    bytes: float

    @classmethod
    def of_fusing(cls, pair: CacheToCache, prompt: AlignedPrompt) -> Self:
        """Returns the work of one fuse of a batch by the pair's first fuser."""
        tokens = prompt.ids.numel() - len(prompt.ids)  # the last of each row is not fused
        # bytes: the receiver's tokens both ways, the sharer's one way, weights once
        read_and_written = 2 * tokens * token_bytes(pair.receiver)
        read = prompt.sharers[0].ids.numel() * token_bytes(pair.sharers[0])
        flops = sum(2 * tokens * weight.numel() for weight in grouped_weights(pair.fusers[0]))
        return cls(flops, parameter_bytes(pair.fusers[0]) + read_and_written + read)


@dataclass(frozen=True)
class Machine:
    """Peak speeds.

    Attributes:
        flops: In matrix products, per second.
        bandwidth: In a copy, bytes read and written per second.
    """

    flops: float
    bandwidth: float

    @classmethod
    def measured(cls, like: Tensor) -> Self:
        """Returns the speeds on a tensor's device, in its dtype."""
        products = [found for side in SIDES[like.device.type] for found in _products(like, side)]
        # a copy too large for any processor's cache
        source = like.new_empty(COPIED_BYTES // like.itemsize).zero_()
        target = torch.empty_like(source)
        seconds = min(timed(target.copy_, source) for _ in range(TRIES))
        return cls(max(_speed(*product) for product in products), 2 * source.nbytes / seconds)

    def seconds(self, work: Work) -> float:
        """Returns the least time of the work: arithmetic or transport, whichever is slower (the roofline)."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)

    def rows(self, setting: str) -> Iterator[Row]:
        """The speeds as rows."""
        yield row("largest rate of matrix products", setting, self.flops / 1e9, None, "GFLOP/s")
        yield row("largest rate of a copy", setting, self.bandwidth / 1e9, None, "GB/s")


def grouped_weights(fuser: Fuser) -> list[Tensor]:
    """``(G, in, out)`` each: the parameters that multiply every token, in the order of the fuser's modules."""
    return [module.weight for module in fuser.modules() if isinstance(module, GroupedLinear)]


def parameter_bytes(module: torch.nn.Module) -> int:
    """Returns the bytes of all parameters and buffers; tied ones count once."""
    return sum(tensor.nbytes for tensor in chain(module.parameters(), module.buffers()))


def token_bytes(model: LanguageModel) -> int:
    """Returns the bytes of one token's keys and values in all layers."""
    spec = model.kv_spec
    return spec.num_layers * spec.num_kv_heads * (spec.key_dim + spec.value_dim) * model.model.dtype.itemsize


def _products(like: Tensor, side: int) -> Iterator[tuple[Callable[..., Any], Tensor, Tensor]]:
    """Products that libraries are good at: square ones, and the shapes of one prompt and of a batch."""
    yield F.linear, torch.randn(side, side).to(like), torch.randn(side, side).to(like)
    yield F.linear, torch.randn(256, side).to(like), torch.randn(side, side).to(like)
    yield torch.bmm, torch.randn(8, 256, side).to(like), torch.randn(8, side, side).to(like)


def _speed(multiply: Callable[..., Any], x: Tensor, weight: Tensor) -> float:
    seconds = min(timed(multiply, x, weight) for _ in range(TRIES))
    return 2 * x.numel() * weight.shape[-1] / seconds
