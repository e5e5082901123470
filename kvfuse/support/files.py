"""ChatOptions of text that other programs wrote, and whole-or-nothing writing.

What is written lies beside its destination until it is complete and on disk.
"""

import codecs
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def sha256(file: Path) -> str:
    """64 hex digits of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_text(path: Path) -> str:
    """Read UTF-8 text with or without a byte order mark; line breaks become ``\\n``.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is not UTF-8.
    """
    require_utf8(path.read_bytes()[:4])
    return path.read_text(encoding="utf-8-sig")


def require_utf8(head: bytes) -> None:
    """Refuse the first four bytes of a text file in UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        ValueError: Names the encoding.
    """
    # UTF-8 text has no zero bytes
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 in head:
        raise ValueError("UTF-16 text (as Windows calls it, Unicode), which is not read: save it as UTF-8")


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
    """Let ``write`` make a file next to its destination, flush it to disk, and move it there.

    A link stays one. What is there and no file, such as a device, is written into as it is: a move would replace it.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        write(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    try:
        write(scratch)
        _flush(scratch)
        scratch.rename(path)
    finally:
        scratch.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
