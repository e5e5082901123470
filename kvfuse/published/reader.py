"""Read a published pair into a fuser: pickles with ``weights_only=True``, every tensor accounted for."""

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
"""For each receiver layer its sharer layer and its projector."""


def find_projectors(folder: Path) -> Path | None:
    """The folder with the projectors of a published pair, if any: itself, ``final`` or the last checkpoint."""
    # 1) The last checkpoint is the one with the largest number
    numbered = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*")]
    checkpoints = [path for number, path in sorted(numbered, key=lambda pair: pair[0].zfill(12), reverse=True)]
    # 2) A mapping or a projector marks a published folder
    candidates = [folder, folder / WEIGHTS, *checkpoints]
    return next((path for path in candidates if (path / MAPPING).is_file() or any(path.glob("projector_*.*"))), None)


def read_published(folder: Path) -> Fuser:
    """Read a published pair.

    Raises:
        CheckpointError: A file is missing, damaged, of an unknown class, or holds NaN, infinity or other tensors than
            its class has.
    """
    weights_folder = find_projectors(folder)
    if weights_folder is None:
        raise _error(f"a published fuser in {folder}", f"no {MAPPING} and no projectors", "check the folder")
    # 1) The pair, the layers and the class from JSON
    names = _read_pair(folder / RECIPE if (folder / RECIPE).is_file() else weights_folder.parent / RECIPE)
    layers = _read_layers(weights_folder / MAPPING)
    cls, arguments = _read_class(weights_folder, sorted({projector for _, projector in layers}))
    # 2) An empty fuser of the same shape
    try:
        config = FUSERS[cls.kind].config_class(**cls.options(arguments), **_pair_options(names, layers, arguments))
        with torch.device("meta"):
            fuser = FUSERS[cls.kind](config)
    except (KeyError, TypeError, ValueError) as error:
        raise _error(f"arguments of a {cls.name} in {weights_folder}", str(error), "use another fuser") from error
    # 3) Its weights
    fuser.load_state_dict(_read_weights(weights_folder, cls, fuser, layers), strict=True, assign=True)
    return fuser.eval()


def _error(expected: str, got: str, advice: str = "download it again") -> CheckpointError:
    return CheckpointError(f"expected {expected}, got {got}; {advice}")


def _read_pair(path: Path) -> dict[str, str]:
    """Names of the two models and their alignment, from the training recipe."""
    model = _read_json(path).get("model")
    wanted = ("base_model", "teacher_model", "is_do_alignment")
    if not isinstance(model, dict) or not all(isinstance(model.get(name), str | bool) for name in wanted):
        expected = f"{path} to name {', '.join(wanted)} under 'model'"
        raise _error(expected, "a file without", "it is no published pair")
    alignment = f"reencode-{model.get('alignment_strategy', 'longest')}" if model["is_do_alignment"] else "identity"
    return {"receiver": model["base_model"], "sharer": model["teacher_model"], "token_alignment": alignment}


def _read_layers(path: Path) -> Layers:
    try:
        (by_sharer,) = _read_json(path).values()
        (by_layer,) = by_sharer.values()
        # of several sources only the first is used
        first = {int(layer): tuple(map(int, sources[0])) for layer, sources in by_layer.items()}
        return [(sharer, projector) for sharer, projector in (first[layer] for layer in range(len(first)))]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        shape = '{"0": {"1": {receiver layer: [[sharer layer, projector]]}}} for every receiver layer'
        raise _error(f"{path} of the form {shape}", f"another ({error!r})") from error


def _read_class(weights_folder: Path, projectors: list[int]) -> tuple[ProjectorClass, dict[str, Any]]:
    """The class of all projectors and the arguments they were made with."""
    first, *others = (_read_json(weights_folder / f"projector_{projector}.json") for projector in projectors)
    if any(other != first for other in others):
        raise _error(f"projectors of one class and size in {weights_folder}", "several", "use another fuser")
    cls = next((cls for cls in CLASSES if cls.name.lower() == str(first.get("class")).lower()), None)
    if cls is None or not isinstance(first.get("init_args"), dict):
        known = ", ".join(cls.name for cls in CLASSES)
        raise _error(f"a projector of class {known} in {weights_folder}", repr(first.get("class")), "use another fuser")
    return cls, first["init_args"]


def _pair_options(names: dict[str, str], layers: Layers, arguments: dict[str, Any]) -> dict[str, Any]:
    """The options of a fuser that describe its pair; weights and tokenizers of its models are unknown."""
    depths = {"receiver": len(layers), "sharer": max(sharer for sharer, _ in layers) + 1}
    pair: dict[str, Any] = {}
    for role, prefix in (("receiver", "target"), ("sharer", "source")):
        dim, heads = arguments[f"{prefix}_dim"], arguments.get(f"{prefix}_num_heads", 1)
        kv = {"num_layers": depths[role], "num_kv_heads": heads, "key_dim": dim, "value_dim": dim}
        pair[role] = {"name": names[role], "kv": kv}
    alignment = names["token_alignment"]
    fuse = "all" if alignment == "identity" else "messages"
    return {**pair, "token_alignment": alignment, "fuse": fuse, "layer_alignment": [sharer for sharer, _ in layers]}


def _read_weights(weights_folder: Path, cls: ProjectorClass, fuser: Fuser, layers: Layers) -> dict[str, Tensor]:
    """All tensors of the fuser, filled layer by layer, so that one pickle at a time is in memory."""
    state: dict[str, Tensor] = {}
    parameters = dict(fuser.named_parameters())
    for layer, (_, projector) in enumerate(layers):
        # 1) One file has exactly the tensors of one layer
        path = weights_folder / f"projector_{projector}.pt"
        read, wanted = _load_pickle(path), list(cls.tensors(fuser, layer))
        if odd := sorted({name for _, name, _ in wanted} ^ (read.keys() - {TEMPERATURE})):
            raise _error(f"{path} to hold the tensors of a {cls.name}", f"one that differs in {odd[0]}")
        tensors = {
            name: _transposed(read[name], parameters[parameter].shape[1:], f"{name} in {path}")
            for parameter, name, _ in wanted
        }
        require_finite(((name, read[name]) for _, name, _ in wanted), path)
        # 2) Memory is taken only after the sizes of the first file are checked
        if not state:
            dtype = next(iter(tensors.values())).dtype
            state = {name: torch.empty(parameter.shape, dtype=dtype) for name, parameter in parameters.items()}
        # 3) Each tensor is one group of a parameter
        for parameter, name, group in wanted:
            state[parameter][group].copy_(tensors[name])
    return state


def _transposed(tensor: Tensor, shape: torch.Size, what: str) -> Tensor:
    """An authors' tensor as a group of a parameter: a product's weight transposed, anything else as a row."""
    turned = tensor.T if tensor.ndim == 2 else tensor.reshape(1, -1)
    if turned.shape != shape:
        advice = "the files do not belong together"
        raise _error(f"{what} of size {tuple(shape)}", str(tuple(turned.shape)), advice)
    return turned


def _load_pickle(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise _error(str(path), "no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the errors of damaged and malicious pickles are not documented
        reason = f"one that cannot be read safely: {first_line(error)[:120]}"
        raise _error(f"a file of tensors alone at {path}", reason) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise _error(f"a file of named tensors at {path}", "something else")
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _error(f"a readable {path.name} in {path.parent}", str(error)) from error
    if not isinstance(content, dict):
        raise _error(f"{path} to hold names and values", f"a {type(content).__name__}")
    return content
