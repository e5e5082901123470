"""A recipe's data -> a data set of rows, mapped from disk or streamed: from files, a folder or the Hub.

Files of JSON and text are read by :mod:`kvfuse.support.rows`, so that a broken line is one bad row and does not end its
file. ``datasets`` reads tables and the Hub.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfuse.errors import RecipeError, first_line
from kvfuse.support.rows import JSON, TABLES, Row, csv_delimiter, kind_of, read_rows
from kvfuse.training.recipe import DataSection

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

READABLE = (*JSON, ".txt", *TABLES)
RAW_COLUMNS = ("source", "line", "raw")
HUB_NAME = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"


def import_datasets() -> Any:
    """Import ``datasets``, which only training needs.

    Raises:
        RecipeError: It is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise RecipeError("expected the package datasets, got none; pip install 'kvfuse[train]'") from error
    return datasets


def load_rows(data: DataSection) -> "Dataset | IterableDataset":
    """Load the rows of a recipe's data, at most ``data.limit`` of them, to be read by :func:`parse`.

    Raises:
        RecipeError: The source does not exist or cannot be read.
    """
    files = _find_files(data)
    with explain_errors(data):
        # Lines are limited as they are read, tables and the Hub after
        if files and kind_of(files[0]) not in TABLES:
            return _load_lines(files, data)
        rows = _load_dataset(files, data)
        return rows if data.limit is None else rows.take(data.limit if data.streaming else min(data.limit, len(rows)))


def parse(row: Row, number: int, data: DataSection) -> tuple[str, int, Row | bytes]:
    """Split a row of :func:`load_rows`, the ``number``-th from 0, into its source, its line and its content.

    Returns:
        File and line, or data set and number from 1; then columns, or bytes for :func:`kvfuse.support.rows.decode`.
    """
    if row.keys() == set(RAW_COLUMNS):
        return row["source"], row["line"], row["raw"]
    return str(data.path), number + 1, row


def require_any(rows: Iterator[Row], data: DataSection) -> Iterator[Row]:
    """Pass rows on. Raises RecipeError where there are none, of which ``datasets`` cannot make a data set."""
    first = next(rows, None)
    if first is None:
        raise RecipeError(
            f"expected rows or documents to learn from in {data.path}, got none; "
            "check data.path, data.split and data.format"
        )
    yield first
    yield from rows


@contextmanager
def explain_errors(data: DataSection) -> Iterator[None]:
    """Raise a one-line RecipeError for rows that cannot be read, also where ``datasets`` wraps the error in its own."""
    try:
        yield
    except (OSError, ValueError, import_datasets().exceptions.DatasetsError) as error:
        # datasets raises its own error from whatever a generator or a parser raised
        wrapped = isinstance(error, import_datasets().exceptions.DatasetGenerationError)
        cause = error.__cause__ if wrapped and error.__cause__ else error
        if isinstance(cause, RecipeError):
            raise cause from None
        raise RecipeError(
            f"expected rows at data.path {data.path}, got: {first_line(cause)}; "
            "correct the file, or check path, name, split and revision"
        ) from error


def _find_files(data: DataSection) -> list[Path]:
    """The files of a path, sorted; none where it looks like the name of a data set on the Hub."""
    path = data.path
    # 1) A folder, a file, or a name on the Hub
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if kind_of(file) in READABLE and file.is_file())
    elif path.is_file():
        files = [path]
    elif kind_of(path) not in READABLE and re.fullmatch(HUB_NAME, path.as_posix()):
        return []
    else:
        raise RecipeError(
            f"expected a file, a folder or a Hub data set at data.path, got {path}, which does not exist; check it"
        )
    # 2) JSON and text may be mixed; tables have columns
    kinds = {kind_of(file) for file in files}
    readable = data.format == "text" or kinds <= set(READABLE)
    if not files or not readable or (kinds & set(TABLES) and len(kinds) > 1):
        found = ", ".join(sorted(kinds)) or "none"
        raise RecipeError(
            f"expected files of one kind at data.path {path}, of {', '.join(READABLE)}, got {found}; name one of them"
        )
    return files


def _load_dataset(files: Sequence[Path], data: DataSection) -> Any:
    """Tables, which ``datasets`` maps and whose columns it types, or a data set of the Hub."""
    load = import_datasets().load_dataset
    if files:
        kind = kind_of(files[0]).removeprefix(".")
        options = {"sep": _common_delimiter(files), "encoding": "utf-8-sig"} if kind == "csv" else {}
        return load(kind, **options, data_files=list(map(str, files)), split="train", streaming=data.streaming)
    return load(data.path.as_posix(), data.name, split=data.split, revision=data.revision, streaming=data.streaming)


def _common_delimiter(files: Sequence[Path]) -> str:
    delimiters = {csv_delimiter(file) for file in files}
    if len(delimiters) > 1:
        raise RecipeError(f"expected CSV files with one delimiter, got {sorted(delimiters)}; write them alike")
    return delimiters.pop()


def _load_lines(files: Sequence[Path], data: DataSection) -> Any:
    """Files of JSON or text as rows of :data:`RAW_COLUMNS`, cached by what the files hold."""
    datasets = import_datasets()
    named = [(file.relative_to(data.path).as_posix() if file != data.path else file.name, file) for file in files]
    types = zip(RAW_COLUMNS, ("string", "int64", "binary"), strict=True)
    features = datasets.Features({name: datasets.Value(kind) for name, kind in types})

    def rows() -> Iterator[Row]:
        found = ((name, *row) for name, file in named for row in read_rows(file, data.separator))
        with explain_errors(data):
            yield from require_any(
                (dict(zip(RAW_COLUMNS, row, strict=True)) for row in islice(found, data.limit)), data
            )

    # 1) Streamed: nothing is stored
    if data.streaming:
        return datasets.IterableDataset.from_generator(rows, features=features)
    # 2) Mapped: stored once per content of the files, under their hash
    content = hashlib.sha256(repr((data.limit, data.separator)).encode())
    for name, file in named:
        with file.open("rb") as opened:
            content.update(name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return datasets.Dataset.from_generator(rows, features=features, fingerprint=content.hexdigest()[:32])
