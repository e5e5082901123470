"""Controls of the audit: what remains of a gain when the sharer's message is another's, an average, or mere noise."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache

from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import overwrite, read_cache, stage, write_cache
from kvfuse.methods.base import OptionScore
from kvfuse.methods.cache_to_cache import Fused
from kvfuse.methods.controls import Mismatched
from kvfuse.methods.donors import choose_donors
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt, stack
from kvfuse.prompts.messages import Prompt
from kvfuse.stages.response_fusion import FusedPrompt, ResponseFuser, TailKV

DERANGEMENTS = (1, 2, 3)
AVERAGED = (11, 12, 13, 14, 15)  # seeds of the donors whose messages are averaged
MEASURED_PROMPTS = 64


class Deranged(Mismatched):
    """The sharers read another prompt of the whole run: one seeded bijection without fixed points.

    Each prompt is read exactly as often as in the matched run, so the difference is due to the pairing alone (Draft-KV,
    https://arxiv.org/abs/2609.34754).

    Args:
        pair: The models.
        seed: Of the bijection.
    """

    def __init__(self, pair: CacheToCache, seed: int) -> None:
        super().__init__(pair)
        self.name, self.seed = f"deranged-{seed}", seed

    def choose(self, keys: Sequence[str]) -> list[int | None]:
        """See :meth:`Mismatched.choose`."""
        return choose_donors(keys, seed=self.seed)


class AdapterOnly(Fused):
    """The mean of the fusers' output over five other prompts: what a fuser does without any message of its own.

    Every position, of the prompt and where it is fused of the response, gets the mean of five fused positions.
    """

    name = "adapter-only"

    def __init__(self, pair: CacheToCache) -> None:
        super().__init__(pair)
        self._donors = [Deranged(pair, seed) for seed in AVERAGED]

    def prepare(self, prompts: Sequence[Prompt], **options: Any) -> None:
        """Choose the donors."""
        for donors in self._donors:
            donors.prepare(prompts)

    def fuse(self, prompts: Sequence[Prompt], batch: AlignedPrompt, max_cache_len: int | None = None) -> FusedPrompt:
        """See :meth:`Fused.fuse`."""
        if batch.ids.shape[1] < 2:
            return FusedPrompt(None)
        # 1) All models read the prompt with each of the donors.
        batches = [stack([donors.align(prompt) for prompt in prompts]) for donors in self._donors]
        caches = [self.pair.read(donated) for donated in batches]
        # 2) Fuse each, and average.
        fused = [
            self.pair.fuse_kv(
                prompt=donated, receiver=read_cache(read.receiver), sharers=[read_cache(each) for each in read.sharers]
            )
            for donated, read in zip(batches, caches, strict=True)
        ]
        config = self.pair.receiver.model.config
        cache = write_cache(config, caches[0].receiver, _mean(fused), max_cache_len)
        if not self.pair.fuse_response:
            return FusedPrompt(cache)
        fusers = self.pair.fusers
        parts = [self.pair.response_fuser(*both, fusers) for both in zip(batches, caches, strict=True)]
        return FusedPrompt(cache, _MeanResponseFuser(parts))

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """See :class:`Method`."""
        batches = [self.option_batch([donors.align(prompt) for prompt in prompts], options) for donors in self._donors]
        # 1) The mean cache of each prompt, repeated for its options
        fused = self.fuse(prompts, stack([self.align(prompt) for prompt in prompts]))
        fused.repeat(batches[0].rows)
        # 2) Each donor reads the options behind its own prompt
        if isinstance(fused.response_fuser, _MeanResponseFuser):
            fused.response_fuser.tails = [batch.tail for batch in batches]
        fused.stage(batches[0].tail)
        return batches[0].score(self.pair.receiver.model, fused.cache)


class MomentMatched(Fused):
    """In place of every sharer's cache stands noise with its mean and covariance, layer by layer."""

    name = "moment-matched"

    def __init__(self, pair: CacheToCache) -> None:
        super().__init__(pair)
        self._moments: list[Moments] = []

    @torch.no_grad()
    def prepare(self, prompts: Sequence[Prompt], **options: Any) -> None:
        """Measure the sharers' caches of the first prompts of the run."""
        read = [self.pair.read_sharers(stack([self.align(prompt)])) for prompt in prompts[:MEASURED_PROMPTS]]
        self._moments = [Moments.of(list(map(read_cache, caches))) for caches in zip(*read, strict=True)]

    def fuse(self, prompts: Sequence[Prompt], batch: AlignedPrompt, max_cache_len: int | None = None) -> FusedPrompt:
        """See :meth:`Fused.fuse`."""
        if batch.ids.shape[1] < 2:
            return FusedPrompt(None)
        caches = self.pair.read(batch)
        # 1) Every prompt's noise in the place of what the sharer read
        for cache, reads, moments in zip(caches.sharers, batch.sharers, self._moments, strict=True):
            kv = read_cache(cache)
            for row, (ids, mask) in enumerate(zip(reads.ids, reads.mask, strict=True)):
                # The noise of a prompt is the same in every batch, beginning at its last token
                seed = zlib.crc32(ids[mask.bool()].numpy().tobytes())
                kv = moments.replace(kv, row, int(mask.sum()), torch.Generator().manual_seed(seed))
            overwrite(cache, kv)
        # 2) The fusers cannot tell the difference but by its content
        return self.pair.fuse(batch, caches=caches, max_cache_len=max_cache_len)


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the tokens of a cache, over the channels of all heads of a layer.

    Attributes:
        means: ``(L, 1, C)`` float64, of keys and of values.
        roots: ``(L, C, C)``, symmetric roots of the covariances.
    """

    means: tuple[Tensor, Tensor]
    roots: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, caches: Sequence[KV]) -> Self:
        """Measure caches ``(L, 1, H, T, D)``."""
        key, value = (_moments([getattr(kv, part)[:, 0] for kv in caches]) for part in ("key", "value"))
        return cls((key[0], value[0]), (key[1], value[1]))

    def replace(self, kv: KV, row: int, tokens: int, generator: torch.Generator) -> KV:
        """Draw the last tokens of a row of ``(L, B, H, T, D)`` anew."""
        drawn = []
        for part, mean, root in zip((kv.key, kv.value), self.means, self.roots, strict=True):
            layers, _, heads, _, width = part.shape
            draws = torch.randn(layers, tokens, heads * width, generator=generator, dtype=torch.float64)
            noise = (mean + draws.to(mean.device) @ root).reshape(layers, tokens, heads, width).transpose(1, 2)
            drawn.append(part.clone())
            drawn[-1][:, row, :, part.shape[3] - tokens :] = noise.to(part)
        return KV(*drawn)


class _MeanResponseFuser(ResponseFuser):
    """Several response fusers of the same receiver and responses, whose keys and values are averaged.

    Attributes:
        tails: For whole responses, the tail of each.
    """

    def __init__(self, parts: Sequence[ResponseFuser]) -> None:
        self.parts = parts
        self.tails: list[AlignedPrompt] = []

    def prefill(self, tail: AlignedPrompt, known: TailKV | None = None) -> KV:
        """See :class:`ResponseFuser`."""
        return _mean([part.prefill(own) for part, own in zip(self.parts, self.tails, strict=True)])

    def feed(self, cache: Cache, ids: Tensor, mask: Tensor) -> None:
        """See :class:`ResponseFuser`."""
        stage(cache, _mean([part.step(ids, mask) for part in self.parts]))

    def reorder(self, rows: Tensor) -> None:
        """See :class:`ResponseFuser`."""
        for part in self.parts:
            part.reorder(rows)


def _moments(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean ``(L, 1, C)`` and a root of the covariance ``(L, C, C)`` of tokens ``(L, H, T, D)``."""
    tokens = torch.cat([part.transpose(1, 2).flatten(2).double() for part in parts], dim=1)  # (L, N, C)
    mean = tokens.mean(1, keepdim=True)
    centred = tokens - mean
    values, vectors = torch.linalg.eigh(centred.mT @ centred / tokens.shape[1])
    return mean, (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT


def _mean(parts: Sequence[KV]) -> KV:
    return KV(torch.stack([part.key for part in parts]).mean(0), torch.stack([part.value for part in parts]).mean(0))
