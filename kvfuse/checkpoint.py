"""A fuser on disk: ``config.json``, ``model.safetensors`` and a model card. Never half-written; the authors' format is read too."""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from kvfuse.errors import CheckpointError, first_line
from kvfuse.fusers import Fuser, fuser_class
from kvfuse.fusers import quantize as quantized
from kvfuse.fusers.execution.quantized import FULL
from kvfuse.fusers.registry import PREFIX
from kvfuse.published.reader import find_projectors, read_published
from kvfuse.published.writer import write_published
from kvfuse.support.files import write_folder

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def save_fuser(fuser: Fuser, folder: str | Path, notes: str = "") -> Path:
    """Write a fuser beside its destination and move it there in one step.

    Args:
        fuser: What to save; only its own weights are written, no model's.
        folder: Replaced if it holds a fuser.
        notes: Markdown for the end of the model card, e.g. what was measured.

    Raises:
        CheckpointError: ``folder`` holds something that is not a fuser.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).exists():
        raise CheckpointError(
            f"expected {folder} to be new or hold a fuser, got a folder with other files; choose another"
        )

    def write(place: Path) -> None:
        fuser.save_pretrained(place)
        (place / CARD).write_text(model_card(fuser, notes), encoding="utf-8")

    return write_folder(folder, write)


def load_fuser(source: str | Path, subfolder: str = "", **options: Any) -> Fuser:
    """Read a fuser from a local folder or the Hub, ours or the authors', after checking that it is whole.

    Args:
        source: Folder or Hub id.
        subfolder: Folder inside of it.
        options: For ``from_pretrained``, e.g. ``dtype``; ``revision`` for the Hub.

    Raises:
        CheckpointError: The folder, or a file in it, is missing, damaged, a pickle, or no fuser of ours.
    """
    folder = _local(source, subfolder, options.pop("revision", None))
    if find_projectors(folder) is not None:
        fuser = read_published(folder)
        return fuser.to(options["dtype"]) if isinstance(options.get("dtype"), torch.dtype) else fuser
    _require_whole(folder)
    try:
        kind = str(PreTrainedConfig.get_config_dict(folder)[0].get("model_type"))
        if kind.startswith(PREFIX):
            fuser_class(kind.removeprefix(PREFIX))  # it may come with a package that is not imported yet
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"expected the {CONFIG} of a fuser in {folder}, got: {first_line(error)}; train or download it again"
        ) from error
    if not config.model_type.startswith(PREFIX):
        raise CheckpointError(
            f"expected a fuser in {folder}, got a model of type {config.model_type!r}; name the fuser's folder"
        )
    fuser, report = AutoModel.from_pretrained(
        folder, config=config, output_loading_info=True, **{"dtype": "auto", **options}
    )
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]]
    if wrong:
        raise CheckpointError(
            f"expected {WEIGHTS} in {folder} to fit its {CONFIG}, got other tensors, such as {wrong[0]}; train or download it again"
        )
    return fuser.eval()


def convert(source: str | Path, folder: str | Path, subfolder: str = "") -> Path:
    """Turn a fuser in the authors' format into ours, or one in ours into theirs.

    Args:
        source: Folder or Hub id.
        folder: New; replaced if it holds a fuser in our format.
        subfolder: Folder inside of ``source``.

    Raises:
        CheckpointError: The fuser cannot be read, or theirs cannot hold it.
    """
    published = find_projectors(_local(source, subfolder, None)) is not None
    fuser = load_fuser(source, subfolder)
    if published:
        return save_fuser(fuser, folder)
    if Path(folder).exists():
        raise CheckpointError(f"expected a new folder, got {folder}, which is there; choose another")
    return write_folder(Path(folder), lambda place: write_published(fuser, place))


def quantize(source: str | Path, folder: str | Path, weights: str, subfolder: str = "") -> str:
    """Write a copy of a fuser with integer weights.

    Args:
        source: Folder or Hub id of a fuser, ours or the authors'.
        folder: New; replaced if it holds another fuser.
        weights: ``int8`` | ``int4``.
        subfolder: Folder inside of ``source``.

    Returns:
        One line with both sizes.

    Raises:
        CheckpointError: The fuser cannot be read, or ``folder`` is its own, or holds something else.
        PairError: See :func:`kvfuse.fusers.quantize`.
    """
    if Path(folder).resolve() == _local(source, subfolder, None).resolve():
        raise CheckpointError(
            f"expected another folder than the fuser's own, got {folder}; the full weights are gone where it is replaced"
        )
    fuser = load_fuser(source, subfolder)
    small = quantized(fuser, weights)
    save_fuser(small, folder)
    before, after = size_of(fuser), size_of(small)
    return f"wrote {folder}: {before / 1e6:,.2f} MB of {_dtype(fuser)} -> {after / 1e6:,.2f} MB of {weights} ({after / before:.0%})"


def size_of(fuser: Fuser) -> int:
    """Bytes of all its weights, as they are on disk."""
    return sum(tensor.nbytes for tensor in fuser.state_dict().values())


def model_card(fuser: Fuser, notes: str = "") -> str:
    """The README of a fuser, as the Hub shows it: which pair it serves, how to use it, what was measured."""
    receiver, sharer = fuser.config.receiver, fuser.config.sharer
    models = [name for name in (receiver["name"], sharer["name"]) if _on_hub(name)]
    data = ModelCardData(base_model=models or None, library_name="kvfuse", tags=["cache-to-cache"])
    return f"""---
{data.to_yaml()}
---

# {fuser.config.model_type}: {sharer["name"]} -> {receiver["name"]}

A fuser for Cache-to-Cache (https://arxiv.org/abs/2510.03215): it writes the KV-cache of the sharer into the receiver's.
{_weights(fuser)}

```python
from kvfuse import CacheToCache

model = CacheToCache.from_pretrained(receiver="{receiver["name"]}", sharer="{sharer["name"]}", fuser="this folder, or its name on the Hub")
print(model.chat("your question", max_new_tokens=64))
```

{notes}
"""


def _weights(fuser: Fuser) -> str:
    if fuser.config.weights == FULL:
        return f"{sum(parameter.numel() for parameter in fuser.parameters()):,} parameters, {_dtype(fuser)}."
    return (
        f"{size_of(fuser) / 1e6:,.2f} MB: its large matrices were rounded to {fuser.config.weights} by `kvfuse quantize`, "
        f"the rest is {_dtype(fuser)}. It cannot be trained further."
    )


def _dtype(fuser: Fuser) -> str:
    return str(fuser.dtype).removeprefix("torch.")


def _on_hub(name: str) -> bool:
    """Whether a model's name is ``owner/name`` and no folder."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()


def _local(source: str | Path, subfolder: str, revision: str | None) -> Path:
    """The folder of a fuser, downloaded if need be; pickles only once the rest shows that it is one of the authors'."""
    if Path(source).is_dir():
        return Path(source) / subfolder
    within = f"{subfolder}/*" if subfolder else None
    try:
        top = snapshot_download(str(source), revision=revision, allow_patterns=within, ignore_patterns=list(PICKLES))
        folder = Path(top, subfolder)
        if find_projectors(folder) is not None:
            snapshot_download(
                str(source), revision=revision, allow_patterns=within, ignore_patterns="*/training_state.pt"
            )
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise CheckpointError(
            f"expected a fuser at {str(source)!r}, found no such folder or Hub repository; check the name"
        ) from error
    return folder


def _require_whole(folder: Path) -> None:
    pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
    if not (folder / WEIGHTS).is_file():
        got = f"the pickle {pickles[0]}, which is never opened" if pickles else "none"
        raise CheckpointError(f"expected {WEIGHTS} in {folder}, got {got}; save the fuser with kvfuse")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            weights.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"expected a whole {WEIGHTS} in {folder}, got a truncated or damaged file ({error}); copy it again"
        ) from error
