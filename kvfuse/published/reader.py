"""Read a published pair into one of our fusers: pickles with ``weights_only=True``, every tensor accounted for."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfuse.errors import CheckpointError, first_line
from kvfuse.fusers import FUSERS, Fuser
from kvfuse.fusers.folder import require_finite
from kvfuse.published.layout import CLASSES, MAPPING, RECIPE, TEMPERATURE, WEIGHTS, ProjectorClass

Layers = list[tuple[int, int]]
"""For each receiver layer the sharer layer and the projector that serve it."""


def find_projectors(folder: Path) -> Path | None:
    """The folder with the projectors of a published pair: itself, ``final``, or the last checkpoint; None: not published."""
    numbered = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*")]
    checkpoints = [path for number, path in sorted(numbered, key=lambda pair: pair[0].zfill(12), reverse=True)]
    places = [folder, folder / WEIGHTS, *checkpoints]
    return next((place for place in places if (place / MAPPING).is_file() or any(place.glob("projector_*.*"))), None)


def read_published(folder: Path) -> Fuser:
    """Read a published pair.

    Raises:
        CheckpointError: A file is missing, damaged, of an unknown class, holds other tensors than its class has, or NaN or
            infinity.
    """
    place = find_projectors(folder)
    if place is None:
        raise CheckpointError(
            f"expected a published fuser in {folder}, got no {MAPPING} and no projectors; check the folder"
        )
    names = _read_pair(folder / RECIPE if (folder / RECIPE).is_file() else place.parent / RECIPE)
    layers = _read_layers(place / MAPPING)
    cls, arguments = _read_class(place, sorted({projector for _, projector in layers}))
    try:
        options = cls.options(arguments)
        pair = _identities(names, layers, arguments)
        with torch.device("meta"):
            fuser = FUSERS[cls.kind](FUSERS[cls.kind].config_class(**pair, **options))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"expected arguments of a {cls.name} in {place}, got: {error}; use another fuser"
        ) from error
    fuser.load_state_dict(_read_weights(place, cls, fuser, layers), strict=True, assign=True)
    return fuser.eval()


def _read_pair(path: Path) -> dict[str, str]:
    """Names of the two models, and how tokens were aligned, from the training recipe."""
    model = _read_json(path).get("model")
    wanted = ("base_model", "teacher_model", "is_do_alignment")
    if not isinstance(model, dict) or not all(isinstance(model.get(name), str | bool) for name in wanted):
        raise CheckpointError(
            f"expected {path} to name {', '.join(wanted)} under 'model', got a file without; it is no published pair"
        )
    aligned = f"reencode-{model.get('alignment_strategy', 'longest')}" if model["is_do_alignment"] else "identity"
    return {"receiver": model["base_model"], "sharer": model["teacher_model"], "token_alignment": aligned}


def _read_layers(path: Path) -> Layers:
    try:
        ((by_sharer,),) = [list(_read_json(path).values())]
        (by_layer,) = by_sharer.values()
        first = {
            int(layer): tuple(map(int, sources[0])) for layer, sources in by_layer.items()
        }  # further ones are never used
        return [(sharer, projector) for sharer, projector in (first[layer] for layer in range(len(first)))]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        shape = '{"0": {"1": {receiver layer: [[sharer layer, projector]]}}} for every receiver layer'
        raise CheckpointError(
            f"expected {path} of the form {shape}, got another ({error!r}); download it again"
        ) from error


def _read_class(place: Path, projectors: list[int]) -> tuple[ProjectorClass, dict[str, Any]]:
    """The class of all projectors and the arguments they were made with."""
    first, *others = (_read_json(place / f"projector_{projector}.json") for projector in projectors)
    if any(other != first for other in others):
        raise CheckpointError(f"expected projectors of one class and size in {place}, got several; use another fuser")
    cls = next((cls for cls in CLASSES if cls.name.lower() == str(first.get("class")).lower()), None)
    if cls is None or not isinstance(first.get("init_args"), dict):
        known = ", ".join(cls.name for cls in CLASSES)
        raise CheckpointError(
            f"expected a projector of class {known} in {place}, got {first.get('class')!r}; use another fuser"
        )
    return cls, first["init_args"]


def _identities(names: dict[str, str], layers: Layers, arguments: dict[str, Any]) -> dict[str, Any]:
    """The part of a fuser's configuration that tells its pair; weights and tokenizers are not known."""
    depths = {"receiver": len(layers), "sharer": max(sharer for sharer, _ in layers) + 1}
    theirs = {"receiver": "target", "sharer": "source"}
    pair: dict[str, Any] = {}
    for whose, depth in depths.items():
        dim, heads = arguments[f"{theirs[whose]}_dim"], arguments.get(f"{theirs[whose]}_num_heads", 1)
        pair[whose] = {
            "name": names[whose],
            "kv": {"num_layers": depth, "num_kv_heads": heads, "key_dim": dim, "value_dim": dim},
        }
    alignment = names["token_alignment"]
    fuse = "all" if alignment == "identity" else "messages"
    return {**pair, "token_alignment": alignment, "fuse": fuse, "layer_alignment": [sharer for sharer, _ in layers]}


def _read_weights(place: Path, cls: ProjectorClass, fuser: Fuser, layers: Layers) -> dict[str, Tensor]:
    """All tensors of the fuser, filled layer by layer, so that one pickle at a time is in memory."""
    state: dict[str, Tensor] = {}
    parameters = dict(fuser.named_parameters())
    for layer, (_, projector) in enumerate(layers):
        path = place / f"projector_{projector}.pt"
        theirs = _load_pickle(path)
        wanted = list(cls.tensors(fuser, layer))
        if odd := sorted({name for _, name, _ in wanted} ^ (theirs.keys() - {TEMPERATURE})):
            raise CheckpointError(
                f"expected {path} to hold the tensors of a {cls.name}, differs in {odd[0]}; download it again"
            )
        mine = {
            name: _turned(theirs[name], parameters[ours].shape[1:], f"{name} in {path}") for ours, name, _ in wanted
        }
        require_finite(((name, theirs[name]) for _, name, _ in wanted), path)
        if not state:  # only now is it known that the sizes are true
            dtype = next(iter(mine.values())).dtype
            state = {name: torch.empty(parameter.shape, dtype=dtype) for name, parameter in parameters.items()}
        for ours, name, group in wanted:
            state[ours][group].copy_(mine[name])
    return state


def _turned(tensor: Tensor, shape: torch.Size, what: str) -> Tensor:
    """One of their tensors as a group of ours: a product's weight turned over, everything else as a row."""
    mine = tensor.T if tensor.ndim == 2 else tensor.reshape(1, -1)
    if mine.shape != shape:
        raise CheckpointError(
            f"expected {what} of size {tuple(shape)}, got {tuple(mine.shape)}; the files do not belong together"
        )
    return mine


def _load_pickle(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"expected {path}, got no such file; download it again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or malicious pickle raises is not documented
        reason = first_line(error)[:120]
        raise CheckpointError(
            f"expected a file of tensors alone at {path}, got one that cannot be read safely: {reason}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"expected a file of named tensors at {path}, got something else; download it again")
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"expected a readable {path.name} in {path.parent}, got: {error}; download it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"expected {path} to hold names and values, got a {type(content).__name__}; download it again"
        )
    return content
