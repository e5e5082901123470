"""The folder of a run: held by one run at a time, and begun with settings and inputs that may not change later."""

import errno
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kvfuse.errors import KVFuseError, first_line
from kvfuse.support.processes import processes

LOCK = ".lock"
PROBE = b"\0" * 2**16  # written and removed again, to find a full disk before a run begins
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
FULL_DISK_WORDS = (
    "No space left",
    "disk is full",
    "PytorchStreamWriter failed",
    "unexpected pos",
)  # of libraries without an errno
SHOWN = 60  # characters of a changed value

Inputs = dict[str, str]
"""What a run reads, by the words that messages call it: a hash of its content."""


@contextmanager
def claim(folder: Path, error: type[KVFuseError]) -> Iterator[None]:
    """Hold a folder for one run.

    The system releases the lock when the process ends, however it ends. Of the processes of one run, the first holds
    it. A folder that is made here is removed again where nothing was written into it.

    Args:
        folder: New or not.
        error: Class of the errors.

    Raises:
        error: Another run holds the folder, it cannot be written, or the disk is or becomes full.
    """
    with ExitStack() as stack:
        stack.enter_context(_explain_full_disk(folder, error))
        if processes().is_main_process:
            stack.enter_context(_lock(folder, error))
        yield


@contextmanager
def _lock(folder: Path, error: type[KVFuseError]) -> Iterator[None]:
    new: list[Path] = []
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        try:
            new += [path for path in (folder, *folder.parents) if not path.exists()]
            if not new and not folder.is_dir():
                raise error(f"expected a folder for the output, got the file {folder}; choose another output")
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            _write_probe(folder)
        except Timeout as taken:
            raise error(
                f"expected one run at a time in {folder}, got a second one while the first is still running; "
                "wait for it, or choose another output"
            ) from taken
        except OSError as fault:
            if isinstance(fault, KVFuseError):
                raise
            raise error(
                f"expected a folder for the output that can be written, got {folder} "
                f"({fault.strerror or first_line(fault)}); choose another output"
            ) from fault
        yield
    finally:
        with suppress(OSError):
            if lock.is_locked:
                (folder / LOCK).unlink(missing_ok=True)
            lock.release()
        with suppress(OSError):  # the first folder with something in it ends this
            for path in new:
                path.rmdir()


def _write_probe(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(PROBE)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _explain_full_disk(folder: Path, error: type[KVFuseError]) -> Iterator[None]:
    """Raise one line where a disk becomes full, whichever library finds out."""
    try:
        yield
    except Exception as fault:
        words = any(words in str(fault) for words in FULL_DISK_WORDS)
        if isinstance(fault, KVFuseError) or not (words or getattr(fault, "errno", None) in FULL_DISK):
            raise
        raise error(
            f"expected room on the disk of {folder}, got a full disk; make room and start again to go on"
        ) from fault


def read_inputs(file: Path) -> Inputs | None:
    """The inputs that a run was begun with; None where none are recorded, as by earlier versions."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """Names the settings that differ, each with both values.

    Args:
        before: Sections within sections.
        now: Of the same form.
        ignored: Dotted keys that may differ, with all keys below them.

    Example:
        ``["train.steps 2 -> 3"]``
    """
    old, new = _flatten(before), _flatten(now)
    differing = [key for key in dict.fromkeys([*new, *old]) if old.get(key) != new.get(key)]
    free = tuple(f"{key}." for key in ignored)
    return [
        f"{key} {_show(old.get(key))} -> {_show(new.get(key))}" for key in differing if not f"{key}.".startswith(free)
    ]


def changed_inputs(before: Inputs | None, now: Inputs) -> list[str]:
    """Names the inputs with another content; those that are not recorded are not compared."""
    return [] if before is None else [name for name, content in before.items() if now.get(name) != content]


def refuse_changes(folder: Path, changes: Collection[str], error: type[KVFuseError]) -> None:
    """Raises ``error``, which names the changes, where there are any."""
    if changes:
        raise error(
            f"expected {folder} to be new or begun by this very run, got one begun by another "
            f"(changed since: {', '.join(changes)}); choose another output, or start again (--overwrite)"
        )


def _flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections within sections -> dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _show(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
