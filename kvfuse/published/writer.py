"""Write a fuser in the authors' format, for their code."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfuse.errors import CheckpointError
from kvfuse.fusers import Fuser
from kvfuse.fusers.registry import PREFIX
from kvfuse.published.layout import CLASSES, MAPPING, RECIPE, TEMPERATURE, WEIGHTS, ProjectorClass

FUSED_POSITIONS = {"identity": "all", "reencode-first": "messages", "reencode-longest": "messages"}
"""Token alignment -> the only ``fuse`` that the authors' code knows with it."""


def write_published(fuser: Fuser, folder: Path) -> None:
    """Fill an empty folder.

    Raises:
        CheckpointError: The published format has no such fuser: another kind, or another token alignment.
    """
    # 1) A class of the authors that computes the same
    config = fuser.config
    cls = next((cls for cls in CLASSES if config.model_type == PREFIX + cls.kind), None)
    lost = cls.lost(config) if cls else []
    if cls is None or lost or FUSED_POSITIONS.get(config.token_alignment) != config.fuse:
        got = f"a {config.model_type} with token_alignment {config.token_alignment!r} that fuses {config.fuse!r}"
        got = f"{got} {', '.join(lost)}".rstrip()
        raise CheckpointError(
            f"expected a fuser that the published format can hold, got {got}; keep it in kvfuse's own"
        )
    # 2) The recipe, which layer feeds which, and a projector per receiver layer
    weights_folder = folder / WEIGHTS
    weights_folder.mkdir()
    _write_json(folder / RECIPE, _recipe(cls, fuser))
    sources = {str(layer): [[sharer, layer]] for layer, sharer in enumerate(config.layers)}
    _write_json(weights_folder / MAPPING, {"0": {"1": sources}})
    description = {"class": cls.name, "init_args": _arguments(cls, fuser)}
    for layer in range(config.receiver_kv.num_layers):
        _write_json(weights_folder / f"projector_{layer}.json", description)
        torch.save(_state(cls, fuser, layer), weights_folder / f"projector_{layer}.pt")


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
    return {
        "source_dim": sharer.key_dim,
        "target_dim": receiver.key_dim,
        "source_num_heads": sharer.num_kv_heads,
        "target_num_heads": receiver.num_kv_heads,
        **cls.arguments(fuser.config),
        "dtype": {"__type__": "torch.dtype", "value": str(fuser.dtype).removeprefix("torch.")},
    }


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
    """The state dict of one projector: products transposed, biases flat, gates without a dimension."""
    parameters = dict(fuser.named_parameters())
    state = {TEMPERATURE: torch.tensor(fuser.config.final_temperature, dtype=fuser.dtype)}
    for parameter, name, group in cls.tensors(fuser, layer):
        tensor = parameters[parameter][group].detach().cpu()
        if name.endswith(".weight") and "norm" not in parameter:
            state[name] = tensor.T.contiguous()
        else:
            state[name] = tensor.reshape(() if name.endswith("gate_logit") else (-1,)).clone()
    return state


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
