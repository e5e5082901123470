"""Prefix caching: reuse what was read and fused of the longest known prefix of a prompt.

Exact caches, computed by a model from tokens, and fused ones are kept apart: a fused cache is no model's cache of its
tokens.
For the same reason the tokens generated over a fused prompt are not kept: their keys and values have attended to fused
ones, so the next turn of a conversation reads the answer again.
"""

import hashlib
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Cache, PreTrainedModel

from kvfuse.cache.kv import KV
from kvfuse.cache.prefix_cache import PrefixCache, exact_text, fused_text
from kvfuse.cache.transformers_cache import Layers, read_layers, start_cache, supports_prefix_reuse
from kvfuse.fusers import Fuser
from kvfuse.fusers.execution.by_group import is_watched
from kvfuse.fusers.layers import version_of
from kvfuse.prompts.alignment import AlignedPrompt
from kvfuse.stages.fuse import RoPEs, fuse
from kvfuse.stages.prefill import Prefill, prefill

DEFAULT_MAX_BYTES = 2**31
SAMPLES_PER_TENSOR = 1024  # in the fingerprint of a fuser; a gate has fewer


@dataclass(frozen=True)
class Stats:
    """What a store holds and has saved so far.

    Attributes:
        prompts: Number of prompts that were read, by each model.
        hits: Number of these with a known prefix.
        tokens: Tokens of all prompts.
        tokens_saved: Tokens that were not read again.
        positions_saved: Positions that were not fused again.
        entries: Caches that are held.
        nbytes: Their size.
    """

    prompts: int = 0
    hits: int = 0
    tokens: int = 0
    tokens_saved: int = 0
    positions_saved: int = 0
    entries: int = 0
    nbytes: int = 0


class PrefixStore:
    """Caches of prompts; the least recently used ones are evicted. Threads may share one.

    Models are distinguished as live objects, so that the result of one load is never given to another in another
    precision; a model whose parameters were changed in place, cast or moved counts as another one. Other ways to change
    what a model or a fuser computes (switching on an adapter, writing to ``parameter.data`` of a model) need
    :meth:`clear`.

    Args:
        max_bytes: Size of all copies together, on the devices of the models. A longer prompt is read without the store.
    """

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._cache = PrefixCache(max_bytes)
        self._names = WeakIdKeyDictionary()
        self._supported = WeakIdKeyDictionary()
        self._numbers = count()
        self._stats = Stats()
        self._lock = Lock()

    @property
    def stats(self) -> Stats:
        entries = self._cache.entries()
        return replace(self._stats, entries=len(entries), nbytes=sum(entry.nbytes for entry in entries))

    def clear(self) -> None:
        """Forget all caches."""
        self._cache.clear()

    def prefill(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, prefiller: Prefill = prefill
    ) -> Cache:
        """As ``prefiller``, which runs over the new tokens only. The cache belongs to the caller."""
        if not (_is_one_prompt(mask) and self._supports(model)):
            return prefiller(model, ids, mask, positions)
        # 1) The longest known prefix.
        owner, text = ("exact", self._name(model)), exact_text(ids, positions)
        entry, known = self._cache.find(owner, text)
        self._count(prompts=1, hits=int(known > 0), tokens=len(text), tokens_saved=known)
        cache = None if entry is None else start_cache(model.config, entry.layers, known, len(text) - known)
        if cache is not None and known == len(text):
            return cache
        # 2) The rest is read, and kept for the next prompt.
        cache = prefiller(model, ids[:, known:], mask, positions[:, known:], cache)
        self._cache.put(owner, text, read_layers(cache))
        return cache

    def fuse(
        self,
        *,
        models: Sequence[PreTrainedModel],
        receiver: KV,
        sharers: Sequence[KV],
        fusers: Sequence[nn.Module],
        prompt: AlignedPrompt,
        fusion: str,
        ropes: RoPEs,
        consume: bool = False,
    ) -> KV:
        """As :func:`kvfuse.stages.fuse.fuse`, run over the new positions only, since a fuser is position-wise.

        ``models`` are the receiver and the sharers; ``receiver`` and ``sharers`` are their exact caches.
        """
        fusers = fusers[: len(sharers)]
        options: dict[str, Any] = {"sharers": sharers, "fusers": fusers, "fusion": fusion, "ropes": ropes}
        supported = _is_one_prompt(prompt.mask) and all(map(self._supports, models))
        if not (supported and fusers and all(map(_is_deterministic, fusers))):
            return fuse(receiver=receiver, prompt=prompt, consume=consume, **options)
        # 1) The longest known prefix, fused by the same fusers from caches of the same models.
        owner = self._fused_owner(models, fusers, fusion, ropes)
        text = fused_text(prompt, len(fusers))
        entry, known = self._cache.find(owner, text)
        self._count(positions_saved=known)
        # 2) It replaces the beginning of the receiver's cache; the rest is fused, and kept for the next prompt.
        fused = receiver if consume else receiver.clone()
        if entry is not None:
            _overwrite(_layers_of(fused), entry.layers, known)
        new = prompt.fuse_mask & (torch.arange(prompt.fuse_mask.shape[1]) >= known)
        fused = fuse(receiver=fused, prompt=replace(prompt, fuse_mask=new), consume=True, **options)
        if known < len(text):
            self._cache.put(owner, text, _layers_of(fused))
        return fused

    def _fused_owner(
        self, models: Sequence[PreTrainedModel], fusers: Sequence[nn.Module], fusion: str, ropes: RoPEs
    ) -> Hashable:
        removed = tuple(ropes[index] is not None for index in range(len(fusers)))
        names = [self._name(model) for model in models[: 1 + len(fusers)]]
        return "fused", fusion, removed, *names, *((self._name(fuser), _fingerprint(fuser)) for fuser in fusers)

    def _name(self, module: nn.Module) -> int:
        """A number of a module as it is: a new one once its parameters have changed, never that of another module."""
        parameters = list(module.parameters())
        with self._lock:
            number, seen = self._names.get(module, (-1, []))
            same = len(seen) == len(parameters) and all(
                reference() is parameter and version == version_of(parameter)
                for (reference, version), parameter in zip(seen, parameters, strict=True)
            )
            if number < 0 or not same:
                number = next(self._numbers)
                versions = [(weakref.ref(parameter), version_of(parameter)) for parameter in parameters]
                self._names[module] = number, versions
            return number

    def _supports(self, model: PreTrainedModel) -> bool:
        """:func:`supports_prefix_reuse`, asked once per model."""
        if model not in self._supported:
            self._supported[model] = supports_prefix_reuse(model)
        return self._supported[model]

    def _count(self, **more: int) -> None:
        with self._lock:
            self._stats = replace(
                self._stats, **{key: getattr(self._stats, key) + added for key, added in more.items()}
            )


def _is_one_prompt(mask: Tensor) -> bool:
    """Whether there is one prompt, without padding, and no gradient is wanted.

    The rows of a batch have known prefixes of unequal lengths, and padding moves their positions in the cache; batches
    are for throughput, a store is for the wait for the next turn.
    """
    return len(mask) == 1 and bool(mask.all()) and not torch.is_grad_enabled()


def _is_deterministic(fuser: nn.Module) -> bool:
    """Whether a fuser gives the same result each time and no hook watches it; the wrappers of controls do not count."""
    return isinstance(fuser, Fuser) and not fuser.training and not is_watched(fuser)


def _fingerprint(fuser: nn.Module) -> bytes:
    """Of the gates and samples of the other weights of a fuser: writing to ``parameter.data`` leaves no other trace."""
    samples = [
        parameter.detach().flatten()[:: -(-parameter.numel() // SAMPLES_PER_TENSOR)].float()
        for parameter in fuser.parameters()
    ]
    return hashlib.sha256(torch.cat(samples).cpu().numpy().tobytes()).digest()


def _layers_of(kv: KV) -> Layers:
    return list(zip(kv.key, kv.value, strict=True))


def _overwrite(layers: Layers, known: Layers, tokens: int) -> None:
    """Copy the first tokens of some layers into others."""
    for parts, known_parts in zip(layers, known, strict=True):
        for part, known_part in zip(parts, known_parts, strict=True):
            part[:, :, :tokens] = known_part[:, :, :tokens]
