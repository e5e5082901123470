"""Remove the rotary embedding from keys and apply it again, by the model's own code, whatever the variant.

Which layers rotate their keys, and by which of the model's embeddings, is measured: a single token attends only to
itself, so its keys at two positions differ by their rotation and nothing else.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import read_cache
from kvfuse.errors import PairError
from kvfuse.stages.prefill import prefill

MEASURED_POSITIONS = (0, 1, 2, 5)
TOLERANCE = 0.02  # share of the keys' norm; rounding to bf16 stays below, a missing rotation is tens of times that


@dataclass(frozen=True)
class TokenRoPE:
    """The rotations of single tokens of one model.

    Attributes:
        function: The model's own ``apply_rotary_pos_emb``.
        layers: The layers with the same rotation, by the name of their embedding; layers without one are left out.
        angles: Cosines and sines, ``(1, N, D_rotary)`` each, by the same names.
    """

    function: Callable[..., Any]
    layers: dict[str, list[int]]
    angles: dict[str, tuple[Tensor, Tensor]]

    def apply(self, kv: KV) -> KV:
        """Rotate keys from position zero to where the cache has them. ``kv`` is ``(L, 1, H, N, D)``."""
        return self._rotate(kv, lambda cos, sin: (cos, sin))

    def remove(self, kv: KV) -> KV:
        """Rotate keys back to position zero; a scale of the embedding is removed too."""
        return self._rotate(kv, lambda cos, sin: (cos / (cos**2 + sin**2), -sin / (cos**2 + sin**2)))

    def _rotate(self, kv: KV, angles_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> KV:
        key = kv.key.clone()
        for name, layers in self.layers.items():
            angles = (angle.to(key.device, torch.float32) for angle in self.angles[name])
            cos, sin = (angle.to(key.dtype) for angle in angles_of(*angles))
            key[layers] = torch.stack([_apply(self.function, part, cos, sin) for part in key[layers]])
        return KV(key, kv.value)


@dataclass(frozen=True)
class RoPE:
    """How one model rotates its keys by their positions.

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
            positions: ``(B, T)`` int64, those of the whole run, since some embeddings depend on its length.
            rows: ``(N,)`` int64.
            columns: ``(N,)`` int64.
            dtype: Of the model's rotations.
        """
        probe = torch.zeros(1, dtype=dtype, device=_device(self.embedding))
        angles = {}
        for name in self.layers:
            both = self.embedding(probe, positions.to(probe.device), *([name] if name else []))
            angles[name] = tuple(angle.expand(len(positions), -1, -1)[rows, columns][None] for angle in both)
        return TokenRoPE(self.function, self.layers, angles)


def measure_rope(model: PreTrainedModel) -> RoPE:
    """Find out which layers of a model rotate their keys, and by which embedding.

    Raises:
        PairError: The model has no rotary embedding, or keys that it does not explain (MLA, whose cache holds something
            else, absolute positions).
    """
    modules = model.base_model.modules()
    embedding = next((module for module in modules if type(module).__name__.endswith("RotaryEmbedding")), None)
    function = getattr(sys.modules.get(type(embedding).__module__), "apply_rotary_pos_emb", None)
    if embedding is None or function is None:
        raise _no_rope(model)
    # 1) A model may have an embedding per kind of layer; which layers use it is to be measured.
    candidates = {name: RoPE(embedding, function, {name: []}) for name in getattr(embedding, "layer_types", [""])}
    spreads = _spreads(model, candidates)
    # 2) Each layer has the embedding, or none, that leaves its keys at all positions alike.
    names = list(spreads)
    least, best = torch.stack(list(spreads.values())).min(dim=0)  # (L,)
    chosen = [names[index] for index in best.tolist()]
    if not bool((least < TOLERANCE).all()) or not any(name is not None for name in chosen):
        raise _no_rope(model)
    layers = {name: [layer for layer, of_layer in enumerate(chosen) if of_layer == name] for name in candidates}
    return RoPE(embedding, function, {name: rotated for name, rotated in layers.items() if rotated})


def _spreads(model: PreTrainedModel, candidates: dict[str, RoPE]) -> dict[str | None, Tensor]:
    """How far a layer's keys of one token at several positions are apart, as they are (None) or without each rotation.

    Returns:
        ``(L,)`` each, as a share of the keys' norm.
    """
    count = len(MEASURED_POSITIONS)
    token = model.get_input_embeddings().num_embeddings // 2  # no padding, whose embedding may be zero
    ids = torch.full((count, 1), token)
    positions, rows = torch.tensor(MEASURED_POSITIONS)[:, None], torch.arange(count)
    columns = torch.zeros_like(rows)
    held = read_cache(prefill(model, ids, torch.ones_like(ids), positions)).tokens(rows, columns)
    kv = held.to(held.key.device, torch.float32)
    spreads: dict[str | None, Tensor] = {None: _spread(kv.key)}
    for name, candidate in candidates.items():
        rope = candidate.at(positions, rows, columns, held.key.dtype)
        everywhere = TokenRoPE(rope.function, {name: list(range(len(kv.key)))}, rope.angles)
        with suppress(RuntimeError, TypeError, ValueError):  # an embedding that its function does not take
            spreads[name] = _spread(everywhere.remove(kv).key)
    return spreads


def _spread(key: Tensor) -> Tensor:
    """``(L, 1, H, N, D)`` -> ``(L,)``: distance from the first token's, as a share of the norm."""
    return (key - key[:, :, :, :1]).flatten(1).norm(dim=1) / key.flatten(1).norm(dim=1)


def _apply(function: Callable[..., Any], key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``(1, H, N, D)``, or its first dimensions."""
    try:
        return function(key, key, cos, sin)[1]
    except RuntimeError:  # some models split off what they do not rotate before they call it (Phi)
        rotated, rest = key.split([cos.shape[-1], key.shape[-1] - cos.shape[-1]], dim=-1)
        return torch.cat([function(rotated, rotated, cos, sin)[1], rest], dim=-1)


def _device(embedding: nn.Module) -> torch.device:
    return next((buffer.device for buffer in embedding.buffers()), torch.device("cpu"))


def _no_rope(model: PreTrainedModel) -> PairError:
    return PairError(
        "expected a model whose keys a rotary embedding turns, as fuser.rope=removed needs, "
        f"got {type(model).__name__}; use fuser.rope=kept"
    )
