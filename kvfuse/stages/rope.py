"""Turn keys back to position zero and forward again, by the model's own rotary embedding, whatever its variant.

Which layers turn their keys, and by which of the model's embeddings, is measured: a single token attends to itself alone, so
its keys at two positions differ by their rotation and nothing else.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvfuse.cache.transformers_cache import KV, read_cache
from kvfuse.errors import PairError
from kvfuse.stages.prefill import prefill

MEASURED_POSITIONS = (0, 1, 2, 5)
TOLERANCE = 0.02  # of the keys' norm; rounding to bf16 stays below, a rotation left out is tens of times that


@dataclass(frozen=True)
class TokenRoPE:
    """The rotations of some tokens of one model, to turn their keys by.

    Attributes:
        function: The model's own ``apply_rotary_pos_emb``.
        layers: The layers that are turned alike, by the name of their embedding; those that turn nothing are in none.
        angles: Their cosines and sines, ``(1, N, D_rotary)`` each.
    """

    function: Callable[..., Any]
    layers: dict[str, list[int]]
    angles: dict[str, tuple[Tensor, Tensor]]

    def apply(self, kv: KV) -> KV:
        """Keys at position zero -> as the cache holds them. ``kv`` is ``(L, 1, H, N, D)``."""
        return self._each(kv, lambda cos, sin: (cos, sin))

    def remove(self, kv: KV) -> KV:
        """Keys as the cache holds them -> at position zero; a scale that the embedding puts on them is taken off too."""
        return self._each(kv, lambda cos, sin: (cos / (cos**2 + sin**2), -sin / (cos**2 + sin**2)))

    def _each(self, kv: KV, angles_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> KV:
        key = kv.key.clone()
        for name, layers in self.layers.items():
            angles = (angle.to(key.device, torch.float32) for angle in self.angles[name])
            cos, sin = (angle.to(key.dtype) for angle in angles_of(*angles))
            key[layers] = torch.stack([_apply(self.function, part, cos, sin) for part in key[layers]])
        return KV(key, kv.value)


@dataclass(frozen=True)
class RoPE:
    """How one model turns its keys by their positions.

    Attributes:
        embedding: The model's rotary embedding.
        function: See :class:`TokenRoPE`.
        layers: See :class:`TokenRoPE`.
    """

    embedding: nn.Module
    function: Callable[..., Any]
    layers: dict[str, list[int]]

    def at(self, positions: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype = torch.float32) -> TokenRoPE:
        """The rotations of single tokens of a batch.

        Args:
            positions: ``(B, T)`` int64, those of the whole run, because some embeddings depend on how long it is.
            rows: ``(N,)`` int64.
            columns: ``(N,)`` int64.
            dtype: What the model computed its rotations in.
        """
        probe = torch.zeros(1, dtype=dtype, device=_device(self.embedding))
        angles = {}
        for name in self.layers:
            both = self.embedding(probe, positions.to(probe.device), *([name] if name else []))
            angles[name] = tuple(angle.expand(len(positions), -1, -1)[rows, columns][None] for angle in both)
        return TokenRoPE(self.function, self.layers, angles)


def measure_rope(model: PreTrainedModel) -> RoPE:
    """Find out which layers of a model turn their keys, and by what.

    Raises:
        PairError: The model has no rotary embedding, or keys that it does not turn or alone does not explain (MLA, whose
            cache holds other things, absolute positions).
    """
    embedding = next(
        (one for one in model.base_model.modules() if type(one).__name__.endswith("RotaryEmbedding")), None
    )
    apply = getattr(sys.modules.get(type(embedding).__module__), "apply_rotary_pos_emb", None)
    if embedding is None or apply is None:
        raise _no_rotation(model)
    candidates = {name: RoPE(embedding, apply, {name: []}) for name in getattr(embedding, "layer_types", [""])}
    spreads = _spreads(model, candidates)
    names = list(spreads)
    least, best = torch.stack(list(spreads.values())).min(dim=0)
    chosen = [names[place] for place in best.tolist()]
    if not bool((least < TOLERANCE).all()) or not any(name is not None for name in chosen):
        raise _no_rotation(model)
    layers = {name: [layer for layer, other in enumerate(chosen) if other == name] for name in candidates}
    return RoPE(embedding, apply, {name: turned for name, turned in layers.items() if turned})


def _spreads(model: PreTrainedModel, candidates: dict[str, RoPE]) -> dict[str | None, Tensor]:
    """How unlike a layer's keys of one token at several positions stay, ``(L,)``, left alone (None) or turned back."""
    count = len(MEASURED_POSITIONS)
    ids = torch.full(
        (count, 1), model.get_input_embeddings().num_embeddings // 2
    )  # no padding, whose embedding may be zero
    positions, rows = torch.tensor(MEASURED_POSITIONS)[:, None], torch.arange(count)
    held = read_cache(prefill(model, ids, torch.ones_like(ids), positions)).tokens(rows, torch.zeros_like(rows))
    kv = held.to(held.key.device, torch.float32)
    spreads: dict[str | None, Tensor] = {None: _spread(kv.key)}
    for name, rope in candidates.items():
        turn = rope.at(positions, rows, torch.zeros_like(rows), held.key.dtype)
        with suppress(RuntimeError, TypeError, ValueError):  # an embedding of another make than its function takes
            spreads[name] = _spread(
                TokenRoPE(turn.function, {name: list(range(len(kv.key)))}, turn.angles).remove(kv).key
            )
    return spreads


def _spread(key: Tensor) -> Tensor:
    """``(L, 1, H, N, D)`` -> ``(L,)``: distance from the first token's, as a share of the norm."""
    return (key - key[:, :, :, :1]).flatten(1).norm(dim=1) / key.flatten(1).norm(dim=1)


def _apply(apply: Callable[..., Any], key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``(1, H, N, D)``, or the first dimensions of it."""
    try:
        return apply(key, key, cos, sin)[1]
    except RuntimeError:  # some models split off what they do not turn before they call it (Phi)
        turned, rest = key.split([cos.shape[-1], key.shape[-1] - cos.shape[-1]], dim=-1)
        return torch.cat([apply(turned, turned, cos, sin)[1], rest], dim=-1)


def _device(embedding: nn.Module) -> torch.device:
    return next((buffer.device for buffer in embedding.buffers()), torch.device("cpu"))


def _no_rotation(model: PreTrainedModel) -> PairError:
    got = type(model).__name__
    return PairError(
        f"expected a model whose keys a rotary embedding turns, as fuser.rope=removed needs, got {got}; use fuser.rope=kept"
    )
