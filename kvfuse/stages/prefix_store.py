"""What was read once is not read again: caches of prompts, kept for those that begin alike, as the next turn of a conversation does.

Exact caches, which a model made of tokens alone, are never taken for fused ones, which fusers changed: a fused cache is no model's
cache of its tokens. So what a receiver generates over a fused prompt is not kept either, for its keys and values have
attended to fused ones; the next turn reads it again.
"""

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from threading import Lock

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Cache, PreTrainedModel

from kvfuse.cache.prefix_cache import PrefixCache, exact_text, fused_text
from kvfuse.cache.transformers_cache import KV, Layers, read_layers, start_cache
from kvfuse.fusers import Fuser
from kvfuse.fusers.execution.by_group import is_watched
from kvfuse.fusers.execution.versions import version_of
from kvfuse.prompts.alignment import AlignedPrompt
from kvfuse.stages.fuse import RoPEs, fuse
from kvfuse.stages.prefill import Prefill, prefill, supports_prefix_reuse

MAX_BYTES = 2**31
SAMPLES = 1024  # of a tensor of a fuser, which is all of a gate


@dataclass(frozen=True)
class Stats:
    """What a store holds and has spared so far.

    Attributes:
        prompts: How many were read, by each model.
        hits: How many of them began as a known one.
        tokens: Of all of them.
        tokens_saved: Of these, not read again.
        positions_saved: Not fused again.
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
    """Caches of prompts, by who made them; the least recently used ones leave. Threads may share one.

    Models are told apart as the live objects they are, so that what one load computed is never given to another in another
    precision; those whose parameters were changed in place, cast or moved are others, too. Other ways to change what a model or a
    fuser computes (an adapter switched on, ``parameter.data`` of a model written to) need :meth:`clear`.

    Args:
        max_bytes: What all copies may take together, on the devices of the models. A longer prompt is read as ever.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._shelf = PrefixCache(max_bytes)
        self._names = WeakIdKeyDictionary()
        self._plain = WeakIdKeyDictionary()
        self._numbers = count()
        self._stats = Stats()
        self._lock = Lock()

    @property
    def stats(self) -> Stats:
        entries = self._shelf.entries()
        return replace(self._stats, entries=len(entries), nbytes=sum(entry.nbytes for entry in entries))

    def clear(self) -> None:
        """Forget all caches."""
        self._shelf.clear()

    def prefill(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, prefiller: Prefill = prefill
    ) -> Cache:
        """As ``prefiller``, by which only what is new is run. The cache is the caller's own."""
        if not (_is_one_prompt(mask) and self._can_go_on(model)):
            return prefiller(model, ids, mask, positions)
        maker, text = ("exact", self._name(model)), exact_text(ids, positions)
        entry, known = self._shelf.find(maker, text)
        self._count(prompts=1, hits=int(known > 0), tokens=len(text), tokens_saved=known)
        cache = None if entry is None else start_cache(model.config, entry.layers, known, len(text) - known)
        if cache is not None and known == len(text):
            return cache
        cache = prefiller(model, ids[:, known:], mask, positions[:, known:], cache)
        self._shelf.keep(maker, text, read_layers(cache))
        return cache

    def fuse(
        self,
        models: Sequence[PreTrainedModel],
        receiver: KV,
        sharers: Sequence[KV],
        fusers: Sequence[nn.Module],
        prompt: AlignedPrompt,
        fusion: str,
        ropes: RoPEs,
        in_place: bool = False,
    ) -> KV:
        """As :func:`kvfuse.stages.fuse.fuse`, of which only what is new is run: a fuser is position-wise.

        ``models`` are the receiver and the sharers, whose exact caches ``receiver`` and ``sharers`` are.
        """
        places = range(min(len(sharers), len(fusers)))
        fusers = fusers[: len(places)]
        if not (
            _is_one_prompt(prompt.mask)
            and all(map(self._can_go_on, models))
            and fusers
            and all(map(_is_settled, fusers))
        ):
            return fuse(receiver, sharers, fusers, prompt, fusion, ropes, in_place)
        turned = tuple(ropes[place] is not None for place in places)
        names = (*map(self._name, models[: 1 + len(places)]), *((self._name(one), _fingerprint(one)) for one in fusers))
        maker, text = ("fused", fusion, turned, *names), fused_text(prompt, len(places))
        entry, known = self._shelf.find(maker, text)
        self._count(positions_saved=known)
        fused = receiver if in_place else receiver.clone()
        if entry is not None:
            _overwrite(_layers_of(fused), entry.layers, known)
        new = prompt.fuse_mask & (torch.arange(prompt.fuse_mask.shape[1]) >= known)
        fused = fuse(fused, sharers, fusers, replace(prompt, fuse_mask=new), fusion, ropes, in_place=True)
        if known < len(text):
            self._shelf.keep(maker, text, _layers_of(fused))
        return fused

    def _name(self, module: nn.Module) -> int:
        """A number for a module as it is, and another one once its parameters have changed; no two modules have the same."""
        parameters = list(module.parameters())
        with self._lock:
            number, seen = self._names.get(module, (-1, []))
            same = len(seen) == len(parameters) and all(
                ref() is one and state == version_of(one) for (ref, state), one in zip(seen, parameters, strict=True)
            )
            if number < 0 or not same:
                number = next(self._numbers)
                self._names[module] = number, [(weakref.ref(one), version_of(one)) for one in parameters]
            return number

    def _can_go_on(self, model: PreTrainedModel) -> bool:
        """:func:`supports_prefix_reuse`, asked once."""
        if model not in self._plain:
            self._plain[model] = supports_prefix_reuse(model)
        return self._plain[model]

    def _count(self, **more: int) -> None:
        with self._lock:
            self._stats = replace(
                self._stats, **{name: getattr(self._stats, name) + added for name, added in more.items()}
            )


def _is_one_prompt(mask: Tensor) -> bool:
    """Whether there is one prompt, without padding, and no gradient is wanted.

    The rows of a batch know beginnings of unequal lengths, and padding moves their positions in the cache; batches are for
    throughput, a store is for who waits for the next turn.
    """
    return len(mask) == 1 and bool(mask.all()) and not torch.is_grad_enabled()


def _is_settled(fuser: nn.Module) -> bool:
    """Whether a fuser always makes the same of the same and nobody looks at it doing so; those wrapped by controls are none."""
    return isinstance(fuser, Fuser) and not fuser.training and not is_watched(fuser)


def _fingerprint(fuser: nn.Module) -> bytes:
    """Of a fuser's gates and some of its other weights, for ``parameter.data`` may be written to without a trace."""
    some = [one.detach().flatten()[:: -(-one.numel() // SAMPLES)].float() for one in fuser.parameters()]
    return hashlib.sha256(torch.cat(some).cpu().numpy().tobytes()).digest()


def _layers_of(kv: KV) -> Layers:
    return list(zip(kv.key, kv.value, strict=True))


def _overwrite(layers: Layers, known: Layers, tokens: int) -> None:
    """Put the first tokens of some layers in place of those of others."""
    for mine, theirs in zip(layers, known, strict=True):
        for part, other in zip(mine, theirs, strict=True):
            part[:, :, :tokens] = other[:, :, :tokens]
