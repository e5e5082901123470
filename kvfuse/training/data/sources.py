"""Files, folders and Hub data sets -> rows, as a data set of the library ``datasets``, mapped or streamed.

Lines of JSON and documents of text are read here, byte by byte as they are, so that a broken one is one bad row and not the
end of a file. Everything else is read by ``datasets``.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfuse.errors import RecipeError, first_line
from kvfuse.training.data.shapes import Row
from kvfuse.training.recipe import DataSection

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

JSON, TABLES = (".json", ".jsonl"), {".csv": "csv", ".parquet": "parquet"}
READABLE = (*JSON, ".txt", *TABLES)
RAW = ("source", "line", "raw")


def import_datasets() -> Any:
    """The library ``datasets``, of which only training has need.

    Raises:
        RecipeError: It is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise RecipeError("expected the package datasets, got none; pip install 'kvfuse[train]'") from error
    return datasets


def load_rows(data: DataSection) -> "Dataset | IterableDataset":
    """The rows of a recipe's data, at most ``data.limit`` of them; what they are is :func:`parse`'s to say.

    Raises:
        RecipeError: There is no such source, or it cannot be read.
    """
    files = _find_files(data)
    with telling(data):
        if files and not {file.suffix for file in files} & TABLES.keys():
            return _read_lines(files, data)
        rows = _read_tables(files, data) if files else _read_hub(data)
        return rows if data.limit is None else rows.take(data.limit if data.streaming else min(data.limit, len(rows)))


@contextmanager
def telling(data: DataSection) -> Iterator[None]:
    """Turn what ``datasets`` says about rows that it cannot read into one line; it wraps our own errors in its own."""
    try:
        yield
    except (OSError, ValueError, import_datasets().exceptions.DatasetsError) as error:
        told = error if isinstance(error, RecipeError) else error.__cause__
        if isinstance(told, RecipeError):
            raise told from None
        raise RecipeError(
            f"expected rows at data.path {data.path}, got: {first_line(error)}; check path, name, split and revision"
        ) from error


def require_any(rows: Iterator[Row], data: DataSection) -> Iterator[Row]:
    """The same rows. Raises RecipeError where there are none, which ``datasets`` cannot make a data set of."""
    first = next(rows, None)
    if first is None:
        raise RecipeError(
            f"expected rows or documents to learn from in {data.path}, got none; check data.path, data.split and data.format"
        )
    yield first
    yield from rows


def parse(row: Row, number: int, data: DataSection) -> tuple[str, int, Row | bytes]:
    """Where a row comes from: file and line, or data set and number; and what it says, of a file in bytes."""
    return tuple(row[key] for key in RAW) if row.keys() == set(RAW) else (str(data.path), number + 1, row)


def decode(source: str, content: Row | bytes) -> Row:
    """What the bytes of a row say.

    Raises:
        ValueError: They are not UTF-8, or not JSON where they should be.
    """
    if isinstance(content, dict):
        return content
    try:
        text = content.decode("utf-8").replace("\r\n", "\n")
        row = json.loads(text) if Path(source).suffix in JSON else {"text": text}
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"unknown shape: a {type(row).__name__}, not an object")
    return row


def _find_files(data: DataSection) -> list[Path]:
    """The files of a path, sorted; none where it looks like the name of a data set on the Hub."""
    path = data.path
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in READABLE and file.is_file())
    elif path.is_file():
        files = [path]
    elif path.suffix not in READABLE and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path.as_posix()):
        return []
    else:
        raise RecipeError(
            f"expected a file, a folder or a Hub data set at data.path, got {path}, which is not there; check it"
        )
    kinds = {file.suffix for file in files}
    if (
        not files
        or (data.format != "text" and not kinds <= set(READABLE))
        or (kinds & TABLES.keys() and len(kinds) > 1)
    ):
        found = ", ".join(sorted(kinds)) or "none"
        raise RecipeError(
            f"expected files of one kind at data.path {path}, of {', '.join(READABLE)}, got {found}; name one of them"
        )
    return files


def _read_tables(files: Sequence[Path], data: DataSection) -> Any:
    kind = TABLES[files[0].suffix]
    return import_datasets().load_dataset(
        kind, data_files=[str(file) for file in files], split="train", streaming=data.streaming
    )


def _read_hub(data: DataSection) -> Any:
    options = {"split": data.split, "revision": data.revision, "streaming": data.streaming}
    return import_datasets().load_dataset(data.path.as_posix(), data.name, **options)


def _read_lines(files: Sequence[Path], data: DataSection) -> Any:
    datasets = import_datasets()
    named = [(str(file.relative_to(data.path) if file != data.path else file.name), file) for file in files]
    features = datasets.Features(
        source=datasets.Value("string"), line=datasets.Value("int64"), raw=datasets.Value("binary")
    )

    def rows() -> Iterator[Row]:
        found = ((name, line, raw) for name, file in named for line, raw in _cut(file, data.separator))
        yield from require_any((dict(zip(RAW, row, strict=True)) for row in islice(found, data.limit)), data)

    if data.streaming:
        return datasets.IterableDataset.from_generator(rows, features=features)
    content = hashlib.sha256(repr((data.limit, data.separator)).encode())
    for name, file in named:
        content.update(name.encode() + file_hash(file))
    return datasets.Dataset.from_generator(rows, features=features, fingerprint=content.hexdigest()[:32])


def file_hash(file: Path) -> bytes:
    """SHA-256 of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _cut(file: Path, separator: str) -> Iterator[tuple[int, bytes]]:
    """The rows of a file with the lines they begin at: its lines, the items of its list, or its documents."""
    if file.suffix not in JSON:
        yield from _documents(file.read_bytes(), separator.encode())
    elif file.suffix == ".json" and _first_byte(file) == b"[":
        yield from _items(file)
    else:
        with file.open("rb") as lines:
            yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _documents(content: bytes, separator: bytes) -> Iterator[tuple[int, bytes]]:
    line = 1
    for document in content.split(separator):
        if document.strip():
            yield line, document
        line += (document + separator).count(b"\n")


def _first_byte(file: Path) -> bytes:
    with file.open("rb") as opened:
        return next((line.lstrip()[:1] for line in opened if line.strip()), b"")


def _items(file: Path) -> Iterator[tuple[int, bytes]]:
    """The items of a JSON list; bytes that are not UTF-8 are carried through to where their row is decoded."""
    text = file.read_bytes().decode("utf-8", errors="surrogateescape")
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    place, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
    while (start := space.match(text, place).end()) == len(text) or text[start] != "]":  # type: ignore[union-attr]
        line += text.count("\n", place, start)
        try:
            place = decoder.raw_decode(text, start)[1]  # at the end of a list without its bracket, too, an error
        except ValueError as error:
            raise RecipeError(
                f"expected a JSON list in {file}, got: {error}; correct it, or write one row a line"
            ) from error
        yield line, text[start:place].encode("utf-8", errors="surrogateescape")
        line += text.count("\n", start, place)
