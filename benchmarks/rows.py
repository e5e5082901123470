"""What a benchmark tells: rows of one form, printed as they come, and kept as JSON or as a table of Markdown."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""figure, setting, value, bar (what the value should be at most, or None) and unit; of what was timed also low and high, of all rounds."""


def row(figure: str, setting: str, value: float, bar: float | None, unit: str) -> Row:
    """One line of the table."""
    return {"figure": figure, "setting": setting, "value": value, "bar": bar, "unit": unit}


def spread_row(figure: str, setting: str, values: Sequence[float], bar: float | None, unit: str) -> Row:
    """One line about several rounds: their median, least and most."""
    return {**row(figure, setting, statistics.median(values), bar, unit), "low": min(values), "high": max(values)}


def report(rows: Iterable[Row], json_file: Path | None = None) -> list[Row]:
    """Print rows as they come, and write those so far to a file: what runs out of time or memory leaves the rest."""
    kept = []
    for found in rows:
        kept.append(found)
        print(line(found), flush=True)
        if json_file is not None:
            json_file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return kept


def line(found: Row) -> str:
    """A row for the terminal."""
    bar = "" if found["bar"] is None else f"bar {found['bar']:g}"
    return f"{found['figure']:66} {found['setting']:44} {found['value']:10.4g} {found['unit']:7} {_range(found):18} {bar}".rstrip()


def markdown(rows: Iterable[Row]) -> str:
    """Rows as a table, those with a bar first."""
    lines = ["| figure | setting | measured | low-high | bar |", "| --- | --- | ---: | ---: | ---: |"]
    for found in sorted(rows, key=lambda found: found["bar"] is None):
        bar = "" if found["bar"] is None else f"{found['bar']:g}"
        lines.append(
            f"| {found['figure']} | {found['setting']} | {found['value']:.3g} {found['unit']} | {_range(found)} | {bar} |"
        )
    return "\n".join(lines) + "\n"


def _range(found: Row) -> str:
    return f"{found['low']:.3g}-{found['high']:.3g}" if found.get("low") != found.get("high") else ""
