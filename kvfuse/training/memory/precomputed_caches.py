"""The models' caches of the training prompts, read once and kept on disk for every epoch."""

import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvfuse.cache.kv import KV, KVSpec
from kvfuse.cache.transformers_cache import read_cache
from kvfuse.errors import PairError, RecipeError
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import stack
from kvfuse.support.files import write_beside
from kvfuse.support.processes import processes
from kvfuse.training.data.columns import EncodedExample, from_columns
from kvfuse.training.loop.batches import Kept

if TYPE_CHECKING:
    from datasets import Dataset

SHARD = 64  # examples in a file
OPEN_FILES = 64
PARTS = ("key", "value")


class PrecomputedCaches:
    """Caches of a data set's prompts in safetensors files, :data:`SHARD` examples each, a tensor per example, model and part.

    Args:
        pair: The models.
        examples: A data set of :func:`kvfuse.training.data.columns.to_columns`.
        folder: For the files; those that an earlier run has left are used.
        receiver: Keep the receiver's caches too, in bfloat16; they are several times as large as a small sharer's.
        dtype: Of the sharers': ``bfloat16``, or ``int8`` with one scale per token and head.

    Raises:
        PairError: Something beside keys and values of prompts would have to be kept.
        RecipeError: The disk has no room for them.
    """

    def __init__(self, pair: CacheToCache, examples: "Dataset", folder: Path, receiver: bool, dtype: str) -> None:
        if pair.fuse_response or (
            receiver and pair.receiver.kv_spec.num_layers != pair.receiver.model.config.num_hidden_layers
        ):
            raise PairError(
                "expected fusers for prompts alone, and where the receiver's caches are kept, one that has keys and values in every layer, "
                "got others; leave out train.keep_caches"
            )
        self.pair, self.examples, self.folder = pair, examples, folder
        self.models = {f"sharer_{place}": dtype for place in range(len(pair.sharers))} | (
            {"receiver": "bfloat16"} if receiver else {}
        )
        self._require_room()
        self._open = lru_cache(OPEN_FILES)(lambda path: safe_open(path, framework="pt"))

    def fill(self, batch_size: int) -> None:
        """Read the prompts of all files that are not there yet, the work shared by all processes."""
        group, shards = processes(), range(0, len(self.examples), SHARD)
        self.folder.mkdir(parents=True, exist_ok=True)
        for first in shards[group.process_index :: group.num_processes]:
            if not self._path(first).exists():
                self._write(first, batch_size)
        group.wait_for_everyone()

    def load(self, rows: Sequence[int]) -> Kept:
        """The caches of some of the examples, as a batch, in the models' own dtypes."""
        sharers = tuple(
            self._load(f"sharer_{place}", rows, one.model.dtype) for place, one in enumerate(self.pair.sharers)
        )
        return Kept(
            self._load("receiver", rows, self.pair.receiver.model.dtype) if "receiver" in self.models else None, sharers
        )

    def remove(self) -> None:
        """Delete all files, once every process has done with them."""
        group = processes()
        group.wait_for_everyone()
        self._open.cache_clear()
        if group.is_main_process:
            shutil.rmtree(self.folder)

    @property
    def bytes(self) -> int:
        """How many all files take."""
        specs = {
            "receiver": self.pair.receiver.kv_spec,
            **{f"sharer_{i}": one.kv_spec for i, one in enumerate(self.pair.sharers)},
        }
        tokens = {"receiver": sum(map(len, self.examples["ids"][:]))}
        for place in range(len(self.pair.sharers)):
            tokens[f"sharer_{place}"] = sum(len(ids[place]) for ids in self.examples["sharer_ids"][:])
        return sum(tokens[name] * _bytes_per_token(specs[name], dtype) for name, dtype in self.models.items())

    def _require_room(self) -> None:
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        there = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        free = shutil.disk_usage(existing).free
        if self.bytes - there > free:
            raise RecipeError(
                f"expected {(self.bytes - there) / 2**30:.1f} GiB of room in {existing} for caches, got {free / 2**30:.1f}; "
                "keep them as int8, those of the sharer alone, or none (train.keep_caches)"
            )

    def _path(self, row: int) -> Path:
        return self.folder / f"{row // SHARD:06d}.safetensors"

    def _write(self, first: int, batch_size: int) -> None:
        rows = range(first, min(first + SHARD, len(self.examples)))
        examples = {row: from_columns(self.examples[row]) for row in rows}
        by_length = sorted(rows, key=lambda row: len(examples[row].prompt.receiver.ids))
        tensors: dict[str, Tensor] = {}
        for start in range(0, len(by_length), batch_size):
            some = by_length[start : start + batch_size]
            tensors |= self._read(some, [examples[row] for row in some])
        write_beside(self._path(first), lambda path: save_file(tensors, path))

    @torch.no_grad()
    def _read(self, rows: Sequence[int], examples: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """The tensors of one batch."""
        prompt = stack([example.prompt for example in examples])
        masks = {f"sharer_{place}": reads.mask for place, reads in enumerate(prompt.sharers)} | {
            "receiver": prompt.mask[:, :-1]
        }
        caches = {f"sharer_{place}": read_cache(cache) for place, cache in enumerate(self.pair.read_sharers(prompt))}
        if "receiver" in self.models:
            caches["receiver"] = read_cache(self.pair.read_receiver(prompt))
        tensors: dict[str, Tensor] = {}
        for name, kv in caches.items():
            for part, place, row in ((part, place, row) for part in PARTS for place, row in enumerate(rows)):
                tokens = int(masks[name][place].sum())
                one = getattr(kv, part)[:, place, :, kv.key.shape[3] - tokens :].cpu()  # (L, H, T, D)
                tensors |= {
                    f"{row}.{name}.{part}{suffix}": kept for suffix, kept in _pack(one, self.models[name]).items()
                }
        return tensors

    def _load(self, name: str, rows: Sequence[int], dtype: torch.dtype) -> KV:
        return KV(*(_pad([self._tensor(f"{row}.{name}.{part}", row).to(dtype) for row in rows]) for part in PARTS))

    def _tensor(self, name: str, row: int) -> Tensor:
        file: Any = self._open(self._path(row))
        kept = file.get_tensor(name)
        return kept * file.get_tensor(f"{name}.scale") if kept.dtype == torch.int8 else kept


def _pack(tensor: Tensor, dtype: str) -> dict[str, Tensor]:
    """``(L, H, T, D)`` as ``dtype``, by the suffix of each tensor's name; int8 with a scale ``(L, H, T, 1)`` float32."""
    if dtype != "int8":
        return {"": tensor.to(getattr(torch, dtype)).contiguous()}
    scale = (tensor.float().abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return {"": (tensor / scale).round().to(torch.int8).contiguous(), ".scale": scale}


def _bytes_per_token(spec: KVSpec, dtype: str) -> int:
    per_head = spec.key_dim + spec.value_dim + 8 if dtype == "int8" else 2 * (spec.key_dim + spec.value_dim)
    return spec.num_layers * spec.num_kv_heads * per_head


def _pad(rows: Sequence[Tensor]) -> Tensor:
    """``(L, H, T, D)`` each -> ``(L, B, H, T, D)``, padded left with zeros."""
    length = max(row.shape[2] for row in rows)
    layers, heads, _, dim = rows[0].shape
    padded = rows[0].new_zeros(layers, len(rows), heads, length, dim)
    for place, row in enumerate(rows):
        padded[:, place, :, length - row.shape[2] :] = row
    return padded
