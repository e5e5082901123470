"""The models' caches of the training examples, computed once and kept on disk for all epochs."""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from kvfuse.cache.kv import KV, KVSpec
from kvfuse.cache.transformers_cache import read_cache
from kvfuse.errors import PairError, RecipeError
from kvfuse.model import CacheToCache
from kvfuse.stages.prefill import ModelCaches
from kvfuse.stages.response_fusion import TailKV
from kvfuse.support.files import write_atomically
from kvfuse.support.processes import processes
from kvfuse.training.data.columns import EncodedExample, from_columns
from kvfuse.training.loop.batches import PromptKV, collate

if TYPE_CHECKING:
    from datasets import Dataset

EXAMPLES_PER_FILE = 64
MAX_OPEN_FILES = 64
TOKENS_PER_READ = 1024
"""Tokens that a model reads at once: with more, a read is hardly faster for each of them."""
PARTS = ("key", "value")


class PrecomputedCaches:
    """Caches of a data set's prompts in safetensors files: one tensor per example, model and part.

    Where the response is fused too, the caches of the responses are kept beside those of the prompts.

    Args:
        pair: The models.
        examples: A data set of :func:`kvfuse.training.data.columns.to_columns`.
        folder: For the files; files of an earlier run are used.
        receiver: Keep the receiver's caches too, in bfloat16; they are several times as large as a small sharer's.
        dtype: Of the sharers' caches: ``bfloat16``, or ``int8`` with one scale per token and head.

    Raises:
        PairError: The models need more than keys and values.
        RecipeError: The disk has no room for the caches.
    """

    def __init__(self, pair: CacheToCache, examples: "Dataset", folder: Path, *, receiver: bool, dtype: str) -> None:
        # A layer without keys and values has a state that cannot be kept here
        partial = pair.receiver.kv_spec.num_layers != pair.receiver.model.config.num_hidden_layers
        if receiver and partial:
            raise PairError(
                "expected a receiver with keys and values in every layer where its caches are kept, got another; "
                "leave out train.keep_caches"
            )
        if pair.fuse_response and not receiver:
            raise PairError(
                "expected the caches of both models where the response is fused too, got the sharer's alone; "
                "set train.keep_caches=both"
            )
        self.pair, self.examples, self.folder = pair, examples, folder
        self.models = {f"sharer_{index}": sharer for index, sharer in enumerate(pair.sharers)}
        self.dtypes = dict.fromkeys(self.models, dtype)
        if receiver:
            self.models["receiver"], self.dtypes["receiver"] = pair.receiver, "bfloat16"
        self._require_room()
        self._open = lru_cache(MAX_OPEN_FILES)(lambda path: safe_open(path, framework="pt"))

    def fill(self, batch_size: int, quiet: bool = False) -> None:
        """Compute the files that are missing; all processes share the work.

        Args:
            batch_size: Examples to read at once; more where they are short (:data:`TOKENS_PER_READ`).
            quiet: Show no progress bar.
        """
        group, starts = processes(), range(0, len(self.examples), EXAMPLES_PER_FILE)
        self.folder.mkdir(parents=True, exist_ok=True)
        # A file that exists is complete: it was moved there after it was written
        missing = [
            start for start in starts[group.process_index :: group.num_processes] if not self._path(start).exists()
        ]
        hidden = quiet or not missing or not group.is_local_main_process
        with tqdm(total=sum(len(self._rows(start)) for start in missing), desc="keeping caches", disable=hidden) as bar:
            for start in missing:
                self._write(start, batch_size, bar)
        group.wait_for_everyone()

    def load(self, rows: Sequence[int]) -> PromptKV:
        """Load the caches of a batch of examples, in the models' own dtypes."""
        prompts = {name: self._load(name, name, rows, "left") for name in self.models}
        receiver, tail = prompts.pop("receiver", None), None
        if self.pair.fuse_response:
            tails = {name: self._load(name, f"{name}.tail", rows, "right") for name in self.models}
            tail = TailKV(tails.pop("receiver"), tuple(tails.values()))
        return PromptKV(receiver, tuple(prompts.values()), tail)

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
        # Tokens per model, times the bytes of one token's cache; responses have none where they are not fused
        tokens: Counter[str] = Counter()
        columns = [("ids", "sharer_ids"), *([("response", "sharer_response")] if self.pair.fuse_response else [])]
        for own, others in columns:
            tokens["receiver"] += sum(map(len, self.examples[own][:]))
            for sharer_ids in self.examples[others][:]:
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

    def _rows(self, start: int) -> range:
        return range(start, min(start + EXAMPLES_PER_FILE, len(self.examples)))

    def _write(self, start: int, batch_size: int, bar: tqdm) -> None:
        examples = {row: from_columns(self.examples[row]) for row in self._rows(start)}
        tensors: dict[str, Tensor] = {}
        for batch in _batches({row: self.examples[row]["length"] for row in examples}, batch_size):
            tensors |= self._compute(batch, [examples[row] for row in batch])
            bar.update(len(batch))
        write_atomically(self._path(start), lambda path: save_file(tensors, path))

    @torch.no_grad()
    def _compute(self, rows: Sequence[int], examples: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """The tensors of one batch, without its padding."""
        batch, kept = collate(examples), "receiver" in self.models
        # 1) The prompts
        prompt = batch.prompt
        receiver = self.pair.read_receiver(prompt) if kept else None
        sharers = self.pair.read_sharers(prompt)
        parts = {
            f"sharer_{index}": (read_cache(cache), prompt.sharers[index].mask) for index, cache in enumerate(sharers)
        }
        if receiver is not None:
            parts["receiver"] = read_cache(receiver), prompt.mask[:, :-1]
        # 2) The responses behind them
        if receiver is not None and self.pair.fuse_response:
            tail = self.pair.read_tail(prompt, ModelCaches(receiver, sharers), batch.tail)
            parts["receiver.tail"] = tail.receiver, batch.tail.mask
            for index, kv in enumerate(tail.sharers):
                parts[f"sharer_{index}.tail"] = kv, batch.tail.sharers[index].mask
        # 3) Cut out each example
        return {
            f"{row}.{name}.{part}{suffix}": packed
            for name, (kv, mask) in parts.items()
            for index, row in enumerate(rows)
            for part in PARTS
            for suffix, packed in _pack(
                getattr(kv, part)[:, index][:, :, mask[index].bool()].cpu(),  # (L, H, T, D)
                self.dtypes[name.removesuffix(".tail")],
            ).items()
        }

    def _load(self, model: str, name: str, rows: Sequence[int], side: str) -> KV:
        dtype = self.models[model].model.dtype
        parts = ([self._tensor(f"{row}.{name}.{part}", row).to(dtype) for row in rows] for part in PARTS)
        return KV(*(_pad(tensors, side) for tensors in parts))

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


def _pad(rows: Sequence[Tensor], side: str) -> Tensor:
    """``(L, H, T, D)`` each -> ``(L, B, H, T, D)``, padded with zeros on the ``left`` or ``right``."""
    by_token = pad_sequence([row.movedim(2, 0) for row in rows], padding_side=side)  # (T, B, L, H, D)
    return by_token.permute(2, 1, 3, 0, 4).contiguous()


def _batches(lengths: dict[int, int], batch_size: int) -> Iterator[list[int]]:
    """The rows in batches of similar length, which have little padding: at least ``batch_size``, more if short."""
    rows = sorted(lengths, key=lengths.__getitem__, reverse=True)
    while rows:
        count = max(batch_size, TOKENS_PER_READ // lengths[rows[0]])
        yield rows[:count]
        rows = rows[count:]
