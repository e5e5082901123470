"""Whole-or-nothing writing: content lies next to its destination until it is complete and on disk."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a new folder next to ``folder``, flush it to disk, and replace ``folder`` by it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh, old = Path(scratch, "new"), Path(scratch, "old")
        fresh.mkdir()
        write(fresh)
        # files before the folder that names them, the folder before it is moved
        for path in (*(path for path in fresh.rglob("*") if path.is_file()), fresh):
            _flush(path)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def write_file(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file next to its destination, flush it to disk, and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    write(scratch)
    _flush(scratch)
    scratch.rename(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
