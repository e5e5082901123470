"""Published figures: read from recipes, and quoted in reports after a slash in the cell of the measured figure."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from kvfuse.evaluation.predictions import Published
from kvfuse.evaluation.report.document import Block, Text


def as_rows(tables: Any) -> Any:
    """Turns a paper's tables into the fields of one :class:`Published` per figure; anything else stays as it is.

    A table has ``values`` by task and method, each a number or numbers by part (``all`` is the whole), ``why_not`` by
    method where rows cannot be run as published, and the other fields of a figure, which hold for all of them:

    ```
    {source: Table 3, values: {mmlu: {receiver: 35.5, sharer: {all: 40.1, law: 38.0}}}}      three figures
    ```

    Raises:
        ValueError: Values that are not by task and method.
    """
    if not isinstance(tables, list):
        return tables
    # a list may mix tables with single figures
    is_table = [isinstance(table, dict) and "values" in table for table in tables]
    rows = [_rows(**table) if flag else [table] for table, flag in zip(tables, is_table, strict=True)]
    return [row for table_rows in rows for row in table_rows]


def _rows(values: Any, why_not: dict[str, str] | None = None, **fields: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(values, dict) or not all(isinstance(methods, dict) for methods in values.values()):
        raise ValueError("values are by task and method")
    for task, methods in values.items():
        for method, value in methods.items():
            common = {**fields, "task": task, "method": method, "why_not": (why_not or {}).get(method)}
            for part, figure in (value if isinstance(value, dict) else {"all": value}).items():
                yield {**common, "part": None if part == "all" else part, "value": figure}


def select(
    published: Sequence[Published], method: str | None = None, unit: str = "%", part: str | None = None
) -> list[Published]:
    """Returns the figures of one unit and part, by one method or all."""
    return [row for row in published if (row.unit, row.part) == (unit, part) and method in (None, row.method)]


def with_published(measured: str, published: Sequence[Published]) -> str:
    """Returns a cell: the measured figure, and after a slash the published one, or the mean of several."""
    return f"{measured} / {fmean(row.value for row in published):.5g}" if published else measured


def sources(published: Sequence[Published]) -> Iterator[Block]:
    """Yields the sources of published figures, and why rows could not be run as published."""
    for source, rows in groupby(published, key=lambda row: row.source):
        figures = (f"{row.method} {row.value:g}{f' ({row.part})' if row.part else ''}" for row in rows)
        yield Text(", ".join(figures) + ".", lead=f"Published, {source}:")
    # a reason holds for all figures of a method, and is given once
    for method, why_not in dict.fromkeys((row.method, row.why_not) for row in published if row.why_not):
        yield Text(why_not, lead=f"{method}, not run as published:")
