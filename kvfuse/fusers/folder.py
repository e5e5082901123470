"""The folder of a fuser: ``config.json``, ``model.safetensors`` and a model card, on disk or on the Hub."""

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from kvfuse.errors import CheckpointError, first_line
from kvfuse.fusers.registry import PREFIX
from kvfuse.support.files import write_folder
from kvfuse.support.hub import FAULTS, missing

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def locate(source: str | Path, subfolder: str = "", *, pickles: bool = False, **download: Any) -> Path:
    """The local folder of a fuser, downloaded if need be.

    Args:
        source: Folder or Hub id.
        subfolder: Folder inside of it.
        pickles: Whether to download pickles as well; only the authors' format needs them.
        download: ``revision``, and others of :data:`kvfuse.support.hub.DOWNLOAD_OPTIONS`.

    Raises:
        CheckpointError: There is no such folder or repository.
    """
    if Path(source).is_dir():
        return Path(source) / subfolder
    found = missing(source)
    if found is not None:
        raise CheckpointError(f"expected a fuser at {str(source)!r}, got {found}; name a local folder or a Hub id")
    within = f"{subfolder}/*" if subfolder else None
    ignored = "*/training_state.pt" if pickles else list(PICKLES)
    try:
        top = snapshot_download(str(source), allow_patterns=within, ignore_patterns=ignored, **download)
    except FAULTS as error:
        got = first_line(error)
        raise CheckpointError(
            f"expected a fuser at {str(source)!r}, got: {got}; name a local folder or a Hub id"
        ) from error
    return Path(top, subfolder)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a fuser whose weights are whole.

    Raises:
        CheckpointError: A file is missing, damaged, a pickle, or no fuser's.
    """
    _require_whole(folder)
    try:
        config, _ = PreTrainedConfig.get_config_dict(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"expected the {CONFIG} of a fuser in {folder}, got: {first_line(error)}; train or download it again"
        ) from error
    if not _is_fusers(config):
        raise CheckpointError(
            f"expected a fuser in {folder}, got a model of type {config.get('model_type')!r}; name the fuser's folder"
        )
    return config


def require_all_weights(folder: Path, report: dict[str, Any]) -> None:
    """Refuse weights that do not fit the configuration.

    Args:
        folder: For the message.
        report: What transformers says of the loading (``output_loading_info``).

    Raises:
        CheckpointError: A tensor is missing, left over or of another shape.
    """
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]]
    if wrong:
        raise CheckpointError(
            f"expected {WEIGHTS} in {folder} to fit its {CONFIG}, got other tensors, such as {wrong[0]}; "
            "train or download it again"
        )


def require_finite(tensors: Iterable[tuple[str, Tensor]], source: Path) -> None:
    """Refuse weights with NaN or infinity, with which every answer would be empty or random.

    Args:
        tensors: Names and weights.
        source: For the message.

    Raises:
        CheckpointError: Names the first such tensor.
    """
    for name, tensor in tensors:
        # Minimum and maximum show both NaN and infinity, and need no memory of the tensor's size
        if tensor.is_floating_point() and tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"expected finite weights in {source}, got NaN or infinity in {name} ({dtype}); "
                "train or download it again"
            )


def write(folder: Path, save: Callable[[Path], None]) -> None:
    """Let ``save`` write a fuser into a fresh folder, then put that in the place of ``folder``; other files are kept.

    Raises:
        CheckpointError: ``folder`` holds something that is not a fuser.
    """
    others = require_replaceable(folder)

    def fill(fresh: Path) -> None:
        save(fresh)
        for other in others:
            (shutil.copytree if other.is_dir() else shutil.copy2)(other, fresh / other.name)

    write_folder(folder, fill)


def require_new(folder: Path, *, overwrite: bool) -> None:
    """Refuse to write a fuser to a folder that is in use, before anything is computed.

    Args:
        folder: May be there if it is empty.
        overwrite: Whether it may hold a fuser, which will be replaced.

    Raises:
        CheckpointError: It holds a fuser that may not be replaced, or anything else.
    """
    require_replaceable(folder)
    if holds_fuser(folder) and not overwrite:
        raise CheckpointError(
            f"expected a new folder, got {folder} with a fuser in it; name another, or overwrite it (--overwrite)"
        )


def require_replaceable(folder: Path) -> list[Path]:
    """The files of a folder that are not those of the fuser in it.

    Raises:
        CheckpointError: It is a file, or a folder with files but no fuser.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"expected {folder} to be a folder, got a file; choose another")
    files = list(folder.iterdir()) if folder.exists() else []
    if files and not holds_fuser(folder):
        raise CheckpointError(
            f"expected {folder} to be new or hold a fuser, got a folder with other files; choose another"
        )
    return [file for file in files if file.name not in (CONFIG, CARD) and ".safetensors" not in file.suffixes]


def holds_fuser(folder: Path) -> bool:
    """Whether a folder has the configuration of a fuser of our format."""
    try:
        return _is_fusers(PreTrainedConfig.get_config_dict(folder)[0])
    except (OSError, ValueError):
        return False


def model_card(fuser: Any, notes: str = "") -> str:
    """The README of a fuser: which pair it serves, how to use it, what was measured (``notes``, in Markdown)."""
    receiver, sharer = (getattr(fuser.config, role)["name"] for role in ("receiver", "sharer"))
    models = [name for name in (receiver, sharer) if _is_hub_id(name)]
    data = ModelCardData(base_model=models or None, library_name="kvfuse", tags=["cache-to-cache"])
    return f"""---
{data.to_yaml()}
---

# {fuser.config.model_type}: {sharer} -> {receiver}

A fuser for Cache-to-Cache (https://arxiv.org/abs/2510.03215): it writes the KV-cache of the sharer into the receiver's.
{_describe_weights(fuser)}

```python
from kvfuse import CacheToCache

pair = CacheToCache.from_pretrained(receiver="{receiver}", sharer="{sharer}", fuser="this folder or Hub id")
print(pair.chat("your question", max_new_tokens=64))
```

{notes}
"""


def size_of(fuser: Any) -> int:
    """Bytes of all weights of a fuser, as they are on disk."""
    return sum(tensor.nbytes for tensor in fuser.state_dict().values())


def dtype_of(fuser: Any) -> str:
    """Name of a fuser's dtype, e.g. ``bfloat16``."""
    return str(fuser.dtype).removeprefix("torch.")


def _describe_weights(fuser: Any) -> str:
    if fuser.config.weights == "full":
        return f"{sum(parameter.numel() for parameter in fuser.parameters()):,} parameters, {dtype_of(fuser)}."
    return (
        f"{size_of(fuser) / 1e6:,.2f} MB: its large matrices were rounded to {fuser.config.weights} "
        f"by `kvfuse quantize`, the rest is {dtype_of(fuser)}. It cannot be trained further."
    )


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


def _is_fusers(config: dict[str, Any]) -> bool:
    return str(config.get("model_type")).startswith(PREFIX)


def _is_hub_id(name: str) -> bool:
    """Whether a model's name is ``owner/name`` and no folder."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()
