"""The models' caches of the training prompts, computed once and kept on disk for all epochs."""

import shutil
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvfuse.cache.kv import KV, KVSpec
from kvfuse.cache.transformers_cache import read_cache
from kvfuse.errors import PairError, RecipeError
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import stack
from kvfuse.support.files import write_atomically
from kvfuse.support.processes import processes
from kvfuse.training.data.columns import EncodedExample, from_columns
from kvfuse.training.loop.batches import PromptKV

if TYPE_CHECKING:
    from datasets import Dataset

EXAMPLES_PER_FILE = 64
MAX_OPEN_FILES = 64
PARTS = ("key", "value")


class PrecomputedCaches:
    """Caches of a data set's prompts in safetensors files: one tensor per example, model and part.

    Args:
        pair: The models.
        examples: A data set of :func:`kvfuse.training.data.columns.to_columns`.
        folder: For the files; files of an earlier run are used.
        receiver: Keep the receiver's caches too, in bfloat16; they are several times as large as a small sharer's.
        dtype: Of the sharers' caches: ``bfloat16``, or ``int8`` with one scale per token and head.

    Raises:
        PairError: The models need more than keys and values of the prompts.
        RecipeError: The disk has no room for the caches.
    """

    def __init__(self, pair: CacheToCache, examples: "Dataset", folder: Path, *, receiver: bool, dtype: str) -> None:
        # A layer without keys and values has a state that cannot be kept here
        partial = pair.receiver.kv_spec.num_layers != pair.receiver.model.config.num_hidden_layers
        if pair.fuse_response or (receiver and partial):
            raise PairError(
                "expected fusers of prompts only, and a receiver with keys and values in every layer where its "
                "caches are kept, got others; leave out train.keep_caches"
            )
        self.pair, self.examples, self.folder = pair, examples, folder
        self.models = {f"sharer_{index}": sharer for index, sharer in enumerate(pair.sharers)}
        self.dtypes = dict.fromkeys(self.models, dtype)
        if receiver:
            self.models["receiver"], self.dtypes["receiver"] = pair.receiver, "bfloat16"
        self._require_room()
        self._open = lru_cache(MAX_OPEN_FILES)(lambda path: safe_open(path, framework="pt"))

    def fill(self, batch_size: int) -> None:
        """Compute the files that are missing; all processes share the work."""
        group, starts = processes(), range(0, len(self.examples), EXAMPLES_PER_FILE)
        self.folder.mkdir(parents=True, exist_ok=True)
        # A file that exists is complete: it was moved there after it was written
        for start in starts[group.process_index :: group.num_processes]:
            if not self._path(start).exists():
                self._write(start, batch_size)
        group.wait_for_everyone()

    def load(self, rows: Sequence[int]) -> PromptKV:
        """Load the caches of a batch of examples, in the models' own dtypes."""
        caches = {name: self._load(name, rows, model.model.dtype) for name, model in self.models.items()}
        receiver = caches.pop("receiver", None)
        return PromptKV(receiver, tuple(caches.values()))

    def remove(self) -> None:
        """Delete all files, after every process has finished with them."""
        group = processes()
        group.wait_for_everyone()
        self._open.cache_clear()
        if group.is_main_process:
            shutil.rmtree(self.folder)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        # Tokens per model, times the bytes of one token's cache
        tokens = Counter(receiver=sum(map(len, self.examples["ids"][:])))
        for sharer_ids in self.examples["sharer_ids"][:]:
            tokens.update({f"sharer_{index}": len(ids) for index, ids in enumerate(sharer_ids)})
        return sum(
            tokens[name] * _bytes_per_token(model.kv_spec, self.dtypes[name]) for name, model in self.models.items()
        )

    def _require_room(self) -> None:
        # The folder may not exist yet, but its disk does
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        needed = self.bytes - sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise RecipeError(
                f"expected {needed / 2**30:.1f} GiB of room in {existing} for caches, got {free / 2**30:.1f}; "
                "keep them as int8, those of the sharer alone, or none (train.keep_caches)"
            )

    def _path(self, row: int) -> Path:
        return self.folder / f"{row // EXAMPLES_PER_FILE:06d}.safetensors"

    def _write(self, start: int, batch_size: int) -> None:
        rows = range(start, min(start + EXAMPLES_PER_FILE, len(self.examples)))
        examples = {row: from_columns(self.examples[row]) for row in rows}
        # Batches of similar length have little padding
        by_length = sorted(rows, key=lambda row: len(examples[row].prompt.receiver.ids))
        tensors: dict[str, Tensor] = {}
        for first in range(0, len(by_length), batch_size):
            batch = by_length[first : first + batch_size]
            tensors |= self._compute(batch, [examples[row] for row in batch])
        write_atomically(self._path(start), lambda path: save_file(tensors, path))

    @torch.no_grad()
    def _compute(self, rows: Sequence[int], examples: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """The tensors of one batch, without its padding."""
        prompt = stack([example.prompt for example in examples])
        # 1) Prefill the models
        caches = {f"sharer_{index}": read_cache(cache) for index, cache in enumerate(self.pair.read_sharers(prompt))}
        masks = {f"sharer_{index}": sharer.mask for index, sharer in enumerate(prompt.sharers)}
        if "receiver" in self.models:
            caches["receiver"], masks["receiver"] = read_cache(self.pair.read_receiver(prompt)), prompt.mask[:, :-1]
        # 2) Cut out each example
        tensors: dict[str, Tensor] = {}
        for name, kv in caches.items():
            for index, row in enumerate(rows):
                padding = kv.key.shape[3] - int(masks[name][index].sum())
                for part in PARTS:
                    tensor = getattr(kv, part)[:, index, :, padding:].cpu()  # (L, H, T, D)
                    for suffix, packed in _pack(tensor, self.dtypes[name]).items():
                        tensors[f"{row}.{name}.{part}{suffix}"] = packed
        return tensors

    def _load(self, name: str, rows: Sequence[int], dtype: torch.dtype) -> KV:
        return KV(*(_pad_left([self._tensor(f"{row}.{name}.{part}", row).to(dtype) for row in rows]) for part in PARTS))

    def _tensor(self, name: str, row: int) -> Tensor:
        file: Any = self._open(self._path(row))
        packed = file.get_tensor(name)
        return packed * file.get_tensor(f"{name}.scale") if packed.dtype == torch.int8 else packed


def _pack(tensor: Tensor, dtype: str) -> dict[str, Tensor]:
    """``(L, H, T, D)`` in ``dtype``, by suffix of the tensor's name; int8 has a float32 ``.scale`` ``(L, H, T, 1)``."""
    if dtype != "int8":
        return {"": tensor.to(getattr(torch, dtype)).contiguous()}
    # Symmetric: the largest value of a head becomes 127
    scale = (tensor.float().abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return {"": (tensor / scale).round().to(torch.int8).contiguous(), ".scale": scale}


def _bytes_per_token(spec: KVSpec, dtype: str) -> int:
    dims = spec.key_dim + spec.value_dim
    per_head = dims + 8 if dtype == "int8" else 2 * dims  # int8 has two float32 scales
    return spec.num_layers * spec.num_kv_heads * per_head


def _pad_left(rows: Sequence[Tensor]) -> Tensor:
    """``(L, H, T, D)`` each -> ``(L, B, H, T, D)``, padded left with zeros."""
    by_token = pad_sequence([row.movedim(2, 0) for row in rows], padding_side="left")  # (T, B, L, H, D)
    return by_token.permute(2, 1, 3, 0, 4).contiguous()
