"""Published figures: as recipes give them, and as reports quote them, behind a stroke in the cell of the measured one."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from kvfuse.evaluation.predictions import Published
from kvfuse.evaluation.report.document import Block, Text


def as_rows(tables: Any) -> Any:
    """Figures as a paper's table has them -> the fields of a :class:`Published` for each; what is no such table stays as it is.

    A table has ``values`` by task and method, each a number or numbers by part (``all`` is the whole), ``why_not`` by method
    where rows cannot be run as published, and the other fields of a figure, which hold for all of them.

    Raises:
        ValueError: Values that are not by task and method.
    """
    if not isinstance(tables, list):
        return tables
    return [
        row
        for table in tables
        for row in (_rows(**table) if isinstance(table, dict) and "values" in table else [table])
    ]


def _rows(values: Any, why_not: dict[str, str] | None = None, **fields: Any) -> list[dict[str, Any]]:
    if not isinstance(values, dict) or not all(isinstance(methods, dict) for methods in values.values()):
        raise ValueError("values are by task and method")
    rows = []
    for task, method, value in ((task, *one) for task, methods in values.items() for one in methods.items()):
        about = {**fields, "task": task, "method": method, "why_not": (why_not or {}).get(method)}
        parts = value if isinstance(value, dict) else {"all": value}
        rows += [{**about, "part": None if part == "all" else part, "value": one} for part, one in parts.items()]
    return rows


def select(
    published: Sequence[Published], method: str | None = None, unit: str = "%", part: str | None = None
) -> list[Published]:
    """The figures of one unit and part, of one method or of all."""
    return [one for one in published if (one.unit, one.part) == (unit, part) and method in (None, one.method)]


def beside(measured: str, published: Sequence[Published]) -> str:
    """A cell: what was measured, and behind a stroke what is published, the mean where that is several tasks'."""
    return f"{measured} / {fmean(one.value for one in published):.5g}" if published else measured


def sources(published: Sequence[Published]) -> Iterator[Block]:
    """Where published figures are from, and why rows could not be run as published."""
    for source, some in groupby(published, key=lambda one: one.source):
        figures = (f"{one.method} {one.value:g}{f' ({one.part})' if one.part else ''}" for one in some)
        yield Text(", ".join(figures) + ".", lead=f"Published, {source}:")
    for method, why_not in dict.fromkeys((one.method, one.why_not) for one in published if one.why_not):
        yield Text(why_not, lead=f"{method}, not run as published:")
