"""Results of benchmarks: rows of one form, printed as they come, and kept as JSON or as a Markdown table."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Row = dict[str, Any]
"""Keys: figure, setting, value, bar (most that the value should be, or None), unit; of several rounds low and high."""
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")]
"""Type of the option that every benchmark has."""


def row(figure: str, setting: str, value: float, bar: float | None, unit: str) -> Row:
    """Returns the row of a single measurement."""
    return {"figure": figure, "setting": setting, "value": value, "bar": bar, "unit": unit}


def spread_row(figure: str, setting: str, values: Sequence[float], bar: float | None, unit: str) -> Row:
    """Returns the row of several rounds: their median, least and most."""
    return {**row(figure, setting, statistics.median(values), bar, unit), "low": min(values), "high": max(values)}


def report(rows: Iterable[Row], json_file: Path | None = None) -> list[Row]:
    """Print rows as they come, and rewrite the file after each, so that a run that dies leaves what it has measured."""
    # the whole file each time: rows are few, runs are long
    kept = []
    for found in rows:
        kept.append(found)
        print(line(found), flush=True)
        if json_file is not None:
            json_file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return kept


def line(found: Row) -> str:
    """Returns a row for the terminal."""
    bar = "" if found["bar"] is None else f"bar {found['bar']:g}"
    value = f"{found['value']:10.4g} {found['unit']:7} {_range(found):18}"
    return f"{found['figure']:66} {found['setting']:44} {value} {bar}".rstrip()


def markdown(rows: Iterable[Row]) -> str:
    """Returns rows as a table, those with a bar first."""
    lines = ["| figure | setting | measured | low-high | bar |", "| --- | --- | ---: | ---: | ---: |"]
    for found in sorted(rows, key=lambda found: found["bar"] is None):
        bar = "" if found["bar"] is None else f"{found['bar']:g}"
        value = f"{found['value']:.3g} {found['unit']} | {_range(found)}"
        lines.append(f"| {found['figure']} | {found['setting']} | {value} | {bar} |")
    return "\n".join(lines) + "\n"


def _range(found: Row) -> str:
    # single measurements have no range
    return f"{found['low']:.3g}-{found['high']:.3g}" if found.get("low") != found.get("high") else ""
