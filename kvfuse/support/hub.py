"""Models and fusers by name: local folders, GGUF files and repositories of the Hub."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError

from kvfuse.errors import PairError, first_line
from kvfuse.support.gguf import converted

SOURCE_OPTIONS = (
    "cache_dir",
    "force_download",
    "gguf_file",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
"""Options of ``from_pretrained`` that say which files to read: of a model, its configuration and its tokenizer."""
DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
"""Those of them that hold for a fuser's repository too; ``revision`` is each repository's own."""
FAULTS = (OSError, struct.error, ValueError, KeyError, ImportError, SafetensorError, HfHubHTTPError, HFValidationError)
"""What transformers and huggingface_hub raise for files that are missing, damaged or out of reach."""


def select(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The options of these names."""
    return {name: options[name] for name in names if name in options}


def pop_download(options: dict[str, Any]) -> dict[str, Any]:
    """Take from the options those for downloading one repository."""
    return {name: options.pop(name) for name in ("revision", *DOWNLOAD_OPTIONS) if name in options}


def is_path(name: str | Path) -> bool:
    """Whether a name is that of a folder or file, there or not, rather than the id of a repository."""
    text = str(name)
    return Path(text).exists() or text.startswith(("/", ".", "~")) or text.count("/") > 1 or "\\" in text


def missing(name: str | Path) -> str | None:
    """What stands in place of a local folder; None where it is there, or the name is a repository's."""
    if not is_path(name) or Path(name).is_dir():
        return None
    return "a file" if Path(name).is_file() else "no such folder"


@contextmanager
def reading(what: str, name: str | Path, source: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where the loaders of transformers read a model's files from; their errors become one line.

    Args:
        what: For the message.
        name: Folder, GGUF file or Hub id.
        source: Some of :data:`SOURCE_OPTIONS`.

    Yields:
        Folder or Hub id, that of the converted copy for a GGUF file; and what is left of ``source``.

    Raises:
        PairError: There is nothing of the kind.
    """
    try:
        # 1) A GGUF file is read from its converted copy
        gguf = _gguf_file(name, source)
        if gguf is not None:
            yield str(converted(gguf)), {}
            return
        # 2) A path that is no folder would be taken for the id of a repository
        found = missing(name)
        if found is not None:
            raise PairError(f"expected {what} at {str(name)!r}, got {found}; name a local folder or a Hub id")
        yield str(name), source
    except PairError:
        raise
    except FAULTS as error:
        got = first_line(error)
        raise PairError(f"expected {what} at {str(name)!r}, got: {got}; name a local folder or a Hub id") from error


def _gguf_file(name: str | Path, source: dict[str, Any]) -> Path | None:
    """The GGUF file that a name and its options mean, downloaded if need be; None where they mean none."""
    if Path(name).suffix == ".gguf" and Path(name).is_file():
        return Path(name)
    file = source.get("gguf_file")
    if file is None:
        return None
    # A file within a folder, or within a repository of the Hub
    if Path(name).is_dir():
        return Path(name, source.get("subfolder", ""), file)
    return Path(hf_hub_download(str(name), file, **select(source, ("revision", "subfolder", *DOWNLOAD_OPTIONS))))
