"""Fusers on disk and on the Hub: load, save, convert between our format and the authors', quantise."""

from pathlib import Path
from typing import Any

import torch

from kvfuse.errors import CheckpointError
from kvfuse.fusers import Fuser
from kvfuse.fusers import quantize as quantize_fuser
from kvfuse.fusers.folder import dtype_of, locate, require_new, size_of
from kvfuse.published.reader import find_projectors, read_published
from kvfuse.published.writer import require_new_published, write_published
from kvfuse.support.files import write_folder
from kvfuse.support.hub import pop_download


def load_fuser(source: str | Path, subfolder: str = "", **options: Any) -> Fuser:
    """Read a fuser of any kind from a local folder or the Hub, in our format or the authors'.

    Args:
        source: Folder or Hub id.
        subfolder: Folder inside of it.
        options: For ``from_pretrained``, e.g. ``dtype``; ``revision``, ``token``, ``cache_dir``, … for the Hub.

    Raises:
        CheckpointError: The folder, or a file in it, is missing, damaged, a pickle, or no fuser of ours.
    """
    download = pop_download(options)
    folder = locate(source, subfolder, **download)
    if find_projectors(folder) is None:
        return Fuser.from_pretrained(folder, **options)
    fuser = read_published(locate(source, subfolder, pickles=True, **download))
    return fuser.to(options["dtype"]) if isinstance(options.get("dtype"), torch.dtype) else fuser


def save_fuser(fuser: Fuser, folder: str | Path, notes: str = "") -> Path:
    """Write a fuser, its configuration and a model card, or nothing (:meth:`kvfuse.fusers.Fuser.save_pretrained`).

    Args:
        fuser: What to save; only its own weights are written, no model's.
        folder: Replaced if it holds a fuser.
        notes: Markdown for the end of the model card, e.g. what was measured.

    Raises:
        CheckpointError: ``folder`` holds something that is not a fuser.
    """
    fuser.save_pretrained(folder, notes=notes)
    return Path(folder)


def convert(source: str | Path, folder: str | Path, subfolder: str = "", *, overwrite: bool = False) -> Path:
    """Turn a fuser in the authors' format into ours, or one in ours into theirs.

    Args:
        source: Folder or Hub id.
        folder: New or empty.
        subfolder: Folder inside of ``source``.
        overwrite: Whether ``folder`` may also hold a fuser in the format to be written, which is replaced.

    Raises:
        CheckpointError: The fuser cannot be read, their format cannot hold it, or ``folder`` is in use.
    """
    folder = Path(folder)
    if find_projectors(locate(source, subfolder)) is not None:
        require_new(folder, overwrite=overwrite)
        return save_fuser(load_fuser(source, subfolder), folder)
    require_new_published(folder, overwrite=overwrite)
    fuser = load_fuser(source, subfolder)
    return write_folder(folder, lambda fresh: write_published(fuser, fresh))


def quantize(
    source: str | Path, folder: str | Path, weights: str, subfolder: str = "", *, overwrite: bool = False
) -> str:
    """Write a copy of a fuser with integer weights.

    Args:
        source: Folder or Hub id of a fuser, in our format or the authors'.
        folder: New or empty.
        weights: ``int8`` | ``int4``.
        subfolder: Folder inside of ``source``.
        overwrite: Whether ``folder`` may also hold another fuser, which is replaced; other files in it are kept.

    Returns:
        One line with both sizes.

    Raises:
        CheckpointError: The fuser cannot be read, or ``folder`` is its own or in use.
        PairError: See :func:`kvfuse.fusers.quantize`.
    """
    if Path(folder).resolve() == locate(source, subfolder).resolve():
        raise CheckpointError(
            f"expected another folder than the fuser's own, got {folder}; "
            "the full weights are gone where it is replaced"
        )
    require_new(Path(folder), overwrite=overwrite)
    fuser = load_fuser(source, subfolder)
    small = quantize_fuser(fuser, weights)
    save_fuser(small, folder)
    before, after = size_of(fuser), size_of(small)
    sizes = f"{before / 1e6:,.2f} MB of {dtype_of(fuser)} -> {after / 1e6:,.2f} MB of {weights}"
    return f"wrote {folder}: {sizes} ({after / before:.0%})"
