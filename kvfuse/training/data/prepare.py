"""All rows -> encoded examples on disk: in parallel, cached by content, with an account of bad rows."""

import atexit
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvfuse.errors import PromptError, RecipeError
from kvfuse.support.rows import Row, decode
from kvfuse.training.data.columns import RECEIVER_COLUMNS, SHARER_COLUMNS, empty_row, features, to_columns
from kvfuse.training.data.encoding import Encoder, TooLongError
from kvfuse.training.data.examples import Example, examples_of, without_oldest_turn
from kvfuse.training.data.sources import explain_errors, import_datasets, load_rows, parse, require_any
from kvfuse.training.recipe import DataSection

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_PER_BATCH, ROWS_PER_HASH = 64, 1000
NOT_ENCODED = {"path", "limit", "validation_share", "max_bad_share", "workers"}
"""Keys of ``data`` that choose rows or change nothing: they do not decide what is encoded of a row."""
BAD_ROWS_SHOWN = 3


@dataclass(frozen=True)
class BadRow:
    """A row, or one turn of it, that is left out; the words of the reason before its colon name the kind of error."""

    source: str
    line: int
    reason: str


@dataclass(frozen=True)
class Prepared:
    """A recipe's data, encoded.

    Attributes:
        examples: A data set of :func:`kvfuse.training.data.columns.to_columns` and ``characters`` of the response.
        bad: Rows that were left out.
        shortened: Number of examples that lost their oldest turns.
        fingerprint: Identifies the examples: rows, tokenizers, templates, options and code. None for streamed rows.
    """

    examples: "Dataset"
    bad: tuple[BadRow, ...]
    shortened: int
    fingerprint: str | None = None

    def __str__(self) -> str:
        kinds = Counter(row.reason.partition(":")[0] for row in self.bad)
        shortened = f", {self.shortened} without their oldest turns" if self.shortened else ""
        bad = f"; bad: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}" if self.bad else ""
        return f"examples: {len(self.examples)}{shortened}{bad}"

    @property
    def content(self) -> str:
        """64 hex digits of the examples alone: the same wherever they come from, and whatever encoded them."""
        digest = hashlib.sha256()
        for table in self.examples.with_format("arrow").iter(ROWS_PER_HASH):
            for name in (*RECEIVER_COLUMNS, *SHARER_COLUMNS, "pad_ids", "characters"):
                for chunk in table.column(name).chunks:
                    _update(digest, chunk)
        return digest.hexdigest()

    def bad_rows(self) -> str:
        """The bad rows as JSON lines."""
        return "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in self.bad)

    def require_enough(self, data: DataSection) -> None:
        """Raises RecipeError for too large a share of bad rows, or too few examples to train on."""
        share = len(self.bad) / max(1, len(self.bad) + len(self.examples))
        if share > data.max_bad_share:
            first = "; ".join(f"{row.source} line {row.line}: {row.reason}" for row in self.bad[:BAD_ROWS_SHOWN])
            raise RecipeError(
                f"expected at most {data.max_bad_share:.1%} bad rows in {data.path}, "
                f"got {share:.1%} ({self}; {first}); correct them, or raise data.max_bad_share"
            )
        if len(self.examples) < 2:
            raise RecipeError(
                f"expected at least 2 examples in {data.path}, got {len(self.examples)}; "
                "check data.format and data.separator"
            )


def prepare(data: DataSection, encoder: Encoder, quiet: bool = False) -> Prepared:
    """Read, check and encode all of a recipe's data, or take it from the cache of ``datasets``.

    Streamed rows are encoded in every run, because nothing shows whether they have changed.

    Raises:
        RecipeError: The source cannot be read, or has no rows.
    """
    # 1) Encode all rows
    with _progress_bars(hidden=quiet):
        rows = load_rows(data)
        encoded = _stream(rows, data, encoder) if data.streaming else _map(rows, data, encoder)
    # 2) Tell examples from bad rows, which have a reason; both are in one data set, so that both are cached
    reasons = encoded["reason"][:] if len(encoded) else []
    examples = encoded.select([index for index, reason in enumerate(reasons) if not reason][: data.limit])
    bad = encoded.select([index for index, reason in enumerate(reasons) if reason])
    return Prepared(
        examples,
        tuple(BadRow(**row) for row in bad.select_columns(["source", "line", "reason"])),
        shortened=sum(examples["shortened"][:]) if len(examples) else 0,
        fingerprint=None if data.streaming else examples._fingerprint,
    )


def split(examples: "Dataset", validation_share: float) -> tuple["Dataset", "Dataset"]:
    """Split into training and held-out examples: the last share is held out, at least one example."""
    held_out = min(max(1, round(len(examples) * validation_share)), len(examples) - 1)
    first = len(examples) - held_out
    return examples.select(range(first)), examples.select(range(first, len(examples)))


def _update(digest: Any, column: Any) -> None:
    """Add an Arrow array of numbers, or of lists of them, to a hash: lengths of lists first, then what is in them."""
    if hasattr(column, "value_lengths"):
        digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
        _update(digest, column.flatten())
    else:
        digest.update(column.to_numpy(zero_copy_only=False).tobytes())


def _map(rows: "Dataset", data: DataSection, encoder: Encoder) -> "Dataset":
    next(require_any(iter(rows), data))  # datasets cannot map an empty data set
    workers = min(data.workers, len(rows))
    return rows.map(
        encode_rows,
        batched=True,
        batch_size=ROWS_PER_BATCH,
        with_indices=True,
        remove_columns=rows.column_names,
        features=features(),
        fn_kwargs={"data": data, "encoder": encoder},
        num_proc=workers if workers > 1 else None,
        new_fingerprint=encoder.fingerprint(rows._fingerprint, data.model_dump(exclude=NOT_ENCODED)),
        desc="encoding",
    )


def _stream(rows: Any, data: DataSection, encoder: Encoder) -> "Dataset":
    def encoded() -> Iterator[Row]:
        found = (row for number, raw in enumerate(rows) for row in _encode_row(raw, number, data, encoder))
        yield from require_any(found, data)

    folder = tempfile.TemporaryDirectory(prefix="kvfuse-")
    atexit.register(folder.cleanup)  # the data set is mapped from it until the process ends
    with explain_errors(data):
        return import_datasets().Dataset.from_generator(
            encoded, features=features(), cache_dir=folder.name, fingerprint="streamed"
        )


def encode_rows(
    batch: dict[str, list[Any]], numbers: Sequence[int], data: DataSection, encoder: Encoder
) -> dict[str, list[Any]]:
    """The function of ``Dataset.map``: columns of rows -> columns of encoded examples and bad rows."""
    # Columns -> rows -> columns
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    found = [
        encoded
        for row, number in zip(rows, numbers, strict=True)
        for encoded in _encode_row(row, number, data, encoder)
    ]
    return {name: [encoded[name] for encoded in found] for name in features()}


def _encode_row(row: Row, number: int, data: DataSection, encoder: Encoder) -> Iterator[Row]:
    """Encode the examples of a row; a bad row or example is kept with its source and the reason."""
    source, line, content = parse(row, number, data)
    origin = {**empty_row(), "source": source, "line": line}
    # 1) A row that cannot be read has no examples
    try:
        examples = examples_of(decode(source, content), data)
    except ValueError as error:
        yield {**origin, "reason": str(error)}
        return
    # 2) Each example may fail by itself
    for example in examples:
        try:
            yield {**origin, **_encode(example, data, encoder)}
        except TooLongError as error:
            yield {**origin, "reason": f"too long: {error}"}
        except PromptError as error:
            yield {**origin, "reason": f"refused prompt: {error}"}


def _encode(example: Example, data: DataSection, encoder: Encoder) -> Row:
    """Encode an example, without its oldest turns where it is too long and the recipe allows that."""
    candidate = example
    while True:
        try:
            columns = to_columns(encoder.encode(candidate))
            return {**columns, "characters": len(example.response), "shortened": int(candidate is not example)}
        except TooLongError:
            # Drop one turn at a time, and refuse the example when none can go
            shorter = without_oldest_turn(candidate) if data.truncation == "drop_history" else None
            if shorter is None:
                raise
            candidate = shorter


@contextmanager
def _progress_bars(*, hidden: bool) -> Iterator[None]:
    """Hide the progress bars of ``datasets`` where asked to, a setting of the whole process, and restore it."""
    datasets = import_datasets()
    restore = hidden and not datasets.are_progress_bars_disabled()
    if restore:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if restore:
            datasets.enable_progress_bars()
