"""Data files -> rows: JSON lines, JSON lists, CSV, Parquet and text, each row with the line it begins at."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
JSON, TABLES = (".json", ".jsonl"), (".csv", ".parquet")
DOCUMENT_SEPARATOR = "<|endoftext|>"
_BETWEEN_ITEMS = re.compile(r"[\s,]*")


def read_rows(file: Path, separator: str = DOCUMENT_SEPARATOR) -> Iterator[tuple[int, Row | bytes]]:
    """Read a file row by row.

    Rows of JSON and text stay bytes until :func:`decode`, so that a broken row does not cost the rest of its file.

    Args:
        file: Read by its suffix: ``.jsonl`` as one object per line, ``.json`` as such lines or as one list, ``.csv``,
            ``.parquet``; any other file as text.
        separator: Between two documents of a text file.

    Yields:
        The line that the row begins at (CSV: ends at; Parquet: number of the row), and the row.

    Raises:
        OSError: The file cannot be opened.
        ValueError: The file is broken as a whole: a CSV or Parquet file, or a JSON list.
    """
    # 1) Tables give rows of columns
    if file.suffix == ".csv":
        yield from _read_csv(file)
    elif file.suffix == ".parquet":
        from pyarrow import parquet

        yield from enumerate(parquet.read_table(file).to_pylist(), start=1)
    # 2) Text and JSON give bytes
    elif file.suffix not in JSON:
        yield from _split_documents(file.read_bytes(), separator.encode())
    elif file.suffix == ".json" and _first_character(file) == "[":
        yield from _split_list(file)
    else:
        with file.open("rb") as lines:
            yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def decode(file: str, content: Row | bytes) -> Row:
    """Decode one row of :func:`read_rows`. A document of a text file becomes a row with the column ``text``.

    Raises:
        ValueError: The bytes are not UTF-8, not JSON or not an object; the words before the colon name the kind.
    """
    if isinstance(content, dict):
        return content
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")  # without a byte order mark
        row = json.loads(text) if Path(file).suffix in JSON else {"text": text}
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"unknown shape: a {type(row).__name__}, not an object")
    return row


def _read_csv(file: Path) -> Iterator[tuple[int, Row]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines)
        try:
            yield from ((table.line_num, dict(row)) for row in table)
        except csv.Error as error:
            raise ValueError(f"broken CSV: {error}") from error


def _split_documents(content: bytes, separator: bytes) -> Iterator[tuple[int, bytes]]:
    line = 1
    for document in content.split(separator):
        if document.strip():
            yield line, document
        line += (document + separator).count(b"\n")


def _first_character(file: Path) -> str:
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        return next((line.lstrip()[:1] for line in lines if line.strip()), "")


def _split_list(file: Path) -> Iterator[tuple[int, bytes]]:
    # Bytes that are not UTF-8 pass through as surrogates: they are reported with the one row that they stand in
    text = file.read_bytes().decode("utf-8", errors="surrogateescape")
    decoder, end = json.JSONDecoder(), text.index("[") + 1
    line = 1 + text.count("\n", 0, end)
    # Decode one item after another, to know where each ends and at which line it begins
    while True:
        start = _BETWEEN_ITEMS.match(text, end).end()  # type: ignore[union-attr]  # it matches the empty string
        line += text.count("\n", end, start)
        if text.startswith("]", start):
            return
        try:
            end = decoder.raw_decode(text, start)[1]  # fails too where the text ends before the list
        except ValueError as error:
            raise ValueError(f"broken JSON list in {file.name}: {error}") from error
        yield line, text[start:end].encode("utf-8", errors="surrogateescape")
        line += text.count("\n", start, end)
