"""Rows -> encoded examples on disk, once: in parallel, cached by content, with an account of what was bad."""

import atexit
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvfuse.errors import PromptError, RecipeError
from kvfuse.support.rows import Row, decode
from kvfuse.training.data.columns import empty_row, features, to_columns
from kvfuse.training.data.encoding import Encoder, TooLongError
from kvfuse.training.data.examples import Example, examples_of, without_oldest_turn
from kvfuse.training.data.sources import explain_errors, import_datasets, load_rows, parse, require_any
from kvfuse.training.recipe import DataSection

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 64
NOT_ENCODED = {"path", "limit", "validation_share", "max_bad_share", "workers"}  # they change which rows, or nothing
SHOWN = 3  # bad rows that an error shows


@dataclass(frozen=True)
class BadRow:
    """A row, or a turn of it, that is not learnt; the words of the reason before its colon are its kind."""

    source: str
    line: int
    reason: str


@dataclass(frozen=True)
class Prepared:
    """What came of a recipe's data.

    Attributes:
        examples: A data set of :func:`kvfuse.training.data.columns.to_columns`, and with ``characters`` of the response.
        bad: What was not learnt.
        shortened: How many examples lost their oldest turns.
        fingerprint: Of the examples, by which ``datasets`` knows them: rows, tokenizers, templates, options and this code; None
            for rows that are streamed.
    """

    examples: "Dataset"
    bad: tuple[BadRow, ...]
    shortened: int
    fingerprint: str | None = None

    def __str__(self) -> str:
        kinds = Counter(row.reason.partition(":")[0] for row in self.bad)
        bad = f"; bad: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}" if self.bad else ""
        return f"examples: {len(self.examples)}{f', {self.shortened} without their oldest turns' if self.shortened else ''}{bad}"

    def bad_rows(self) -> str:
        """The bad rows as JSON lines."""
        return "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in self.bad)

    def require_enough(self, data: DataSection) -> None:
        """Raises RecipeError where too many rows are bad, or too few are left to learn from."""
        share = len(self.bad) / max(1, len(self.bad) + len(self.examples))
        first = "; ".join(f"{row.source} line {row.line}: {row.reason}" for row in self.bad[:SHOWN])
        if share > data.max_bad_share:
            raise RecipeError(
                f"expected at most {data.max_bad_share:.1%} bad rows in {data.path}, got {share:.1%} ({self}; {first}); "
                "correct them, or raise data.max_bad_share"
            )
        if len(self.examples) < 2:
            raise RecipeError(
                f"expected at least 2 examples in {data.path}, got {len(self.examples)}; check data.format and data.separator"
            )


def prepare(data: DataSection, encoder: Encoder, quiet: bool = False) -> Prepared:
    """Read, check and encode all of a recipe's data; a second time, what is encoded already is read from the cache of ``datasets``.

    Rows that are streamed are encoded in every run: nothing tells whether they are still the same.

    Raises:
        RecipeError: The source cannot be read, or has no rows.
    """
    with _progress_bars(not quiet):
        rows = load_rows(data)
        encoded = _stream(rows, data, encoder) if data.streaming else _map(rows, data, encoder)
    reasons = encoded["reason"][:] if len(encoded) else []
    good = [place for place, reason in enumerate(reasons) if not reason][: data.limit]
    bad = encoded.select([place for place, reason in enumerate(reasons) if reason]).select_columns(
        ["source", "line", "reason"]
    )
    examples = encoded.select(good)
    fingerprint = None if data.streaming else examples._fingerprint
    return Prepared(
        examples, tuple(BadRow(**row) for row in bad), sum(examples["shortened"][:]) if good else 0, fingerprint
    )


def split(examples: "Dataset", validation_share: float) -> tuple["Dataset", "Dataset"]:
    """Hold out the last share of the examples, at least one of them."""
    held_out = min(max(1, round(len(examples) * validation_share)), len(examples) - 1)
    return examples.select(range(len(examples) - held_out)), examples.select(
        range(len(examples) - held_out, len(examples))
    )


def _map(rows: "Dataset", data: DataSection, encoder: Encoder) -> "Dataset":
    next(require_any(iter(rows), data))
    workers = min(data.workers, len(rows))
    return rows.map(
        encode_rows,
        batched=True,
        batch_size=BATCH,
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
        found = (one for number, row in enumerate(rows) for one in _encode_row(row, number, data, encoder))
        yield from require_any(found, data)

    folder = tempfile.TemporaryDirectory(prefix="kvfuse-")
    atexit.register(folder.cleanup)  # what is read from it lives as long as anything
    with explain_errors(data):
        return import_datasets().Dataset.from_generator(
            encoded, features=features(), cache_dir=folder.name, fingerprint="streamed"
        )


def encode_rows(
    batch: dict[str, list[Any]], numbers: Sequence[int], data: DataSection, encoder: Encoder
) -> dict[str, list[Any]]:
    """What ``Dataset.map`` calls: columns of rows -> columns of encoded examples and bad rows."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    found = [one for row, number in zip(rows, numbers, strict=True) for one in _encode_row(row, number, data, encoder)]
    return {name: [one[name] for one in found] for name in features()}


def _encode_row(row: Row, number: int, data: DataSection, encoder: Encoder) -> Iterator[Row]:
    """The examples of a row, each with what is wrong with it, if anything."""
    source, line, content = parse(row, number, data)
    place = {**empty_row(), "source": source, "line": line}
    try:
        examples = examples_of(decode(source, content), data)
    except ValueError as error:
        yield {**place, "reason": str(error)}
        return
    for example in examples:
        try:
            yield {**place, **_encode(example, data, encoder)}
        except TooLongError as error:
            yield {**place, "reason": f"too long: {error}"}
        except PromptError as error:
            yield {**place, "reason": f"refused prompt: {error}"}


def _encode(example: Example, data: DataSection, encoder: Encoder) -> Row:
    shorter: Example | None = example
    while shorter is not None:
        try:
            columns = to_columns(encoder.encode(shorter))
            return {**columns, "characters": len(example.response), "shortened": int(shorter is not example)}
        except TooLongError as error:
            refused = error
            shorter = without_oldest_turn(shorter) if data.truncation == "drop_history" else None
    raise refused


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Those of ``datasets``, which are on or off for a whole process."""
    datasets = import_datasets()
    before = datasets.are_progress_bars_disabled()
    if not shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()
