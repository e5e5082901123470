"""Write a fuser as the authors publish theirs, for code that reads nothing else."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfuse.errors import CheckpointError
from kvfuse.fusers import Fuser
from kvfuse.fusers.registry import PREFIX
from kvfuse.published.layout import CLASSES, MAPPING, RECIPE, TEMPERATURE, WEIGHTS, ProjectorClass


def write_published(fuser: Fuser, folder: Path) -> None:
    """Fill an empty folder.

    Raises:
        CheckpointError: The published format has no such fuser: another kind, or another way to align tokens.
    """
    config = fuser.config
    cls = next((cls for cls in CLASSES if fuser.config.model_type == PREFIX + cls.kind), None)
    fused = {"identity": "all", "reencode-first": "messages", "reencode-longest": "messages"}.get(
        config.token_alignment
    )
    if cls is None or fused != config.fuse or cls.lost(config):
        options = ", ".join(cls.lost(config)) if cls else ""
        got = f"a {config.model_type} with token_alignment {config.token_alignment!r} that fuses {config.fuse!r} {options}".rstrip()
        raise CheckpointError(
            f"expected a fuser that the published format can hold, got {got}; keep it in kvfuse's own"
        )
    arguments = _arguments(cls, fuser)
    _write_json(folder / RECIPE, _recipe(cls, fuser))
    place = folder / WEIGHTS
    place.mkdir()
    _write_json(
        place / MAPPING, {"0": {"1": {str(layer): [[sharer, layer]] for layer, sharer in enumerate(config.layers)}}}
    )
    for layer in range(config.receiver_kv.num_layers):
        _write_json(place / f"projector_{layer}.json", {"class": cls.name, "init_args": arguments})
        torch.save(_state(cls, fuser, layer), place / f"projector_{layer}.pt")


def require_new_published(folder: Path, *, overwrite: bool) -> None:
    """Refuse to write to a folder that is in use.

    Args:
        folder: May be there if it is empty.
        overwrite: Whether it may hold what :func:`write_published` writes and nothing else.

    Raises:
        CheckpointError: It holds a published fuser that may not be replaced, or anything else.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"expected {folder} to be a folder, got a file; choose another")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    is_published = names == {RECIPE, WEIGHTS} and (folder / WEIGHTS / MAPPING).is_file()
    if names and not (overwrite and is_published):
        hint = ", or overwrite it (--overwrite)" if is_published else ""
        raise CheckpointError(f"expected a new folder, got {folder}, which is there; choose another{hint}")


def _arguments(cls: ProjectorClass, fuser: Fuser) -> dict[str, Any]:
    sharer, receiver = fuser.config.sharer_kv, fuser.config.receiver_kv
    dtype = {"__type__": "torch.dtype", "value": str(fuser.dtype).removeprefix("torch.")}
    sizes = {"source_dim": sharer.key_dim, "target_dim": receiver.key_dim}
    heads = {"source_num_heads": sharer.num_kv_heads, "target_num_heads": receiver.num_kv_heads}
    return {**sizes, **heads, **cls.arguments(fuser.config), "dtype": dtype}


def _recipe(cls: ProjectorClass, fuser: Fuser) -> dict[str, Any]:
    config = fuser.config
    aligned = config.token_alignment.startswith("reencode-")
    model = {
        "base_model": config.receiver["name"],
        "teacher_model": config.sharer["name"],
        "is_do_alignment": aligned,
        "alignment_strategy": config.token_alignment.removeprefix("reencode-") if aligned else "first",
        "projector": {"type": cls.name, "params": cls.arguments(config)},
        "mapping": "k_nearest" if config.layer_alignment == "depth-normalized" else "last_aligned",
    }
    return {"model": model}


def _state(cls: ProjectorClass, fuser: Fuser, layer: int) -> dict[str, Tensor]:
    """The state dict of one projector: products turned over, biases flat, gates without a dimension."""
    parameters = dict(fuser.named_parameters())
    state = {TEMPERATURE: torch.tensor(fuser.config.final_temperature, dtype=fuser.dtype)}
    for ours, theirs, group in cls.tensors(fuser, layer):
        tensor = parameters[ours][group].detach().cpu()
        is_product = theirs.endswith(".weight") and "norm" not in ours
        state[theirs] = (
            tensor.T.contiguous()
            if is_product
            else tensor.reshape(() if theirs.endswith("gate_logit") else (-1,)).clone()
        )
    return state


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
