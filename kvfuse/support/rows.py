"""Data files -> rows: JSON lines, JSON lists, CSV, Parquet and text, each row with the line it begins at.

They are read as other programs write them: compressed by gzip, with a byte order mark, with ``\\r\\n``, CSV with
semicolons or tabs.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvfuse.support.files import require_utf8

Row = dict[str, Any]
JSON, TABLES = (".json", ".jsonl"), (".csv", ".parquet")
GZIP = ".gz"
DELIMITERS = (",", ";", "\t")
DOCUMENT_SEPARATOR = "<|endoftext|>"
_BETWEEN_ITEMS = re.compile(r"[\s,]*")


def read_rows(file: Path, separator: str = DOCUMENT_SEPARATOR) -> Iterator[tuple[int, Row | bytes]]:
    """Read a file row by row.

    Rows of JSON and text stay bytes until :func:`decode`, so that a broken row does not cost the rest of its file.

    Args:
        file: Read by its kind (:func:`kind_of`): ``.jsonl`` as one object per line, ``.json`` as such lines or as one
            list, ``.csv``, ``.parquet``; any other file as text.
        separator: Between two documents of a text file.

    Yields:
        The line that the row begins at (CSV: ends at; Parquet: number of the row), and the row.

    Raises:
        OSError: The file cannot be opened.
        ValueError: The file is broken as a whole: a CSV or Parquet file, a JSON list, gzip or UTF-16.
    """
    kind = kind_of(file)
    # 1) Parquet is binary
    if kind == ".parquet":
        from pyarrow import parquet

        yield from enumerate(parquet.read_table(file).to_pylist(), start=1)
        return
    try:
        with _open_text(file) as opened:
            # 2) CSV gives rows of columns
            if kind == ".csv":
                yield from _read_csv(opened, csv_delimiter(file))
            # 3) Text and JSON give bytes
            elif kind not in JSON:
                yield from _split_documents(opened.read(), separator.encode())
            elif kind == ".json" and opened.peek().lstrip()[:1] == b"[":
                yield from _split_list(opened.read(), file.name)
            else:
                yield from ((number, line) for number, line in enumerate(opened, start=1) if line.strip())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"broken gzip: {error}") from error


def kind_of(file: str | Path) -> str:
    """The suffix that names what a file holds: ``.jsonl`` for ``rows.jsonl`` and ``rows.jsonl.gz``."""
    path = Path(file)
    return (Path(path.stem) if path.suffix == GZIP else path).suffix


def csv_delimiter(file: Path) -> str:
    """The character between the columns of a CSV file, judged by its header: a comma, a semicolon or a tab.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is not UTF-8.
    """
    with _open_text(file) as opened:
        header = opened.readline().decode("utf-8")
    unquoted = re.sub(r'"[^"]*"', "", header)
    return max(DELIMITERS, key=unquoted.count)


def decode(file: str, content: Row | bytes) -> Row:
    """Decode one row of :func:`read_rows`. A document of a text file becomes a row with the column ``text``.

    Raises:
        ValueError: The bytes are not UTF-8, not JSON or not an object; the words before the colon name the kind.
    """
    if isinstance(content, dict):
        return content
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")  # without a byte order mark
        row = json.loads(text) if kind_of(file) in JSON else {"text": text}
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"unknown shape: a {type(row).__name__}, not an object")
    return row


@contextmanager
def _open_text(file: Path) -> Iterator[io.BufferedReader]:
    """Open a file to read its bytes, without compression and byte order mark. Raises ValueError if it is UTF-16."""
    with file.open("rb") as opened, io.BufferedReader(_uncompressed(opened, file)) as lines:
        head = lines.peek(4)[:4]
        require_utf8(head)
        lines.read(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        yield lines


def _uncompressed(opened: Any, file: Path) -> Any:
    return gzip.GzipFile(fileobj=opened) if file.suffix == GZIP else opened


def _read_csv(opened: io.BufferedReader, delimiter: str) -> Iterator[tuple[int, Row]]:
    lines = io.TextIOWrapper(opened, encoding="utf-8", newline="")
    table = csv.DictReader(lines, delimiter=delimiter)
    try:
        yield from ((table.line_num, dict(row)) for row in table)
    except csv.Error as error:
        raise ValueError(f"broken CSV: {error}") from error
    finally:
        lines.detach()  # the file is closed by the function that opened it


def _split_documents(content: bytes, separator: bytes) -> Iterator[tuple[int, bytes]]:
    line = 1
    for document in content.split(separator):
        if document.strip():
            yield line, document
        line += (document + separator).count(b"\n")


def _split_list(content: bytes, name: str) -> Iterator[tuple[int, bytes]]:
    # Bytes that are not UTF-8 pass through as surrogates: they are reported with the one row that they stand in
    text = content.decode("utf-8", errors="surrogateescape")
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
            raise ValueError(f"broken JSON list in {name}: {error}") from error
        yield line, text[start:end].encode("utf-8", errors="surrogateescape")
        line += text.count("\n", start, end)
