"""Controls of the audit: what remains of a gain when the sharer's message is another's, an average, or mere noise."""

import copy
import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvfuse.cache.kv import KV, KVSpec
from kvfuse.cache.transformers_cache import overwrite, read_cache, stage, write_cache
from kvfuse.fusers.normal_equations import NormalEquations
from kvfuse.methods.base import OptionScore
from kvfuse.methods.cache_to_cache import Fused
from kvfuse.methods.controls import Mismatched
from kvfuse.methods.donors import choose_donors
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt, stack
from kvfuse.prompts.messages import Prompt
from kvfuse.stages.prefill import ModelCaches
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
        # 1) The receiver reads the prompt, the sharers read each of the donors
        receiver = self.pair.read_receiver(batch)
        batches = [stack([donors.align(prompt) for prompt in prompts]) for donors in self._donors]
        caches = [ModelCaches(receiver, self.pair.read_sharers(donated)) for donated in batches]
        # 2) Fuse each, and average
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
        # 3) Each donor's response is read behind a cache of its own
        parts = [
            self.pair.response_fuser(donated, ModelCaches(copy.deepcopy(receiver), read.sharers), self.pair.fusers)
            for donated, read in zip(batches, caches, strict=True)
        ]
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
        self._moments = [Moments(sharer.kv_spec) for sharer in pair.sharers]

    @torch.no_grad()
    def prepare(self, prompts: Sequence[Prompt], **options: Any) -> None:
        """Measure the sharers' caches of the first prompts of the run."""
        self._moments = [Moments(sharer.kv_spec) for sharer in self.pair.sharers]
        for prompt in prompts[:MEASURED_PROMPTS]:
            caches = self.pair.read_sharers(stack([self.align(prompt)]))
            for moments, cache in zip(self._moments, caches, strict=True):
                moments.add(read_cache(cache))

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


class Moments:
    """Mean and covariance of a cache's tokens, over the channels of all heads of a layer; on the CPU, in float64.

    Args:
        spec: Of the cache.
    """

    def __init__(self, spec: KVSpec) -> None:
        widths = (spec.num_kv_heads * dim for dim in (spec.key_dim, spec.value_dim))
        self._sums = [NormalEquations(spec.num_layers, width, 0, torch.device("cpu")) for width in widths]

    def add(self, kv: KV) -> None:
        """See more tokens, ``(L, B, H, T, D)`` without padding."""
        for sums, part in zip(self._sums, (kv.key, kv.value), strict=True):
            tokens = part.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2).cpu()  # (L, B * T, C)
            sums.add(tokens, tokens[..., :0])

    def replace(self, kv: KV, row: int, tokens: int, generator: torch.Generator) -> KV:
        """Draw the last tokens of a row of ``(L, B, H, T, D)`` anew."""
        drawn = []
        for part, (mean, root) in zip((kv.key, kv.value), self._moments, strict=True):
            layers, _, heads, _, width = part.shape
            draws = torch.randn(layers, tokens, heads * width, generator=generator, dtype=torch.float64)
            noise = (mean + draws @ root).reshape(layers, tokens, heads, width).transpose(1, 2)
            drawn.append(part.clone())
            drawn[-1][:, row, :, part.shape[3] - tokens :] = noise.to(part)
        return KV(*drawn)

    @cached_property
    def _moments(self) -> list[tuple[Tensor, Tensor]]:
        """Of keys and of values the mean ``(L, 1, C)`` and the symmetric root of the covariance ``(L, C, C)``."""
        found = []
        for sums in self._sums:
            mean, scatter = sums.centred()
            values, vectors = torch.linalg.eigh(scatter / sums.count)
            found.append((mean, (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT))
        return found


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


def _mean(parts: Sequence[KV]) -> KV:
    return KV(torch.stack([part.key for part in parts]).mean(0), torch.stack([part.value for part in parts]).mean(0))
