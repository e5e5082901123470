"""Single answers of a run: where methods disagree, and what failed."""

from collections import Counter
from collections.abc import Iterator, Sequence

from kvfuse.evaluation.predictions import Prediction
from kvfuse.evaluation.report.document import Block, Heading, Table, Text
from kvfuse.evaluation.scoring.metrics import RIGHT

SAMPLES, CHARACTERS = 6, 240


def failures(predictions: Sequence[Prediction]) -> Iterator[Block]:
    """What failed, by error, and how often; nothing where nothing did."""
    failed = [row for row in predictions if row.failed is not None]
    if failed:
        counts = Counter((row.task, row.method, row.failed) for row in failed)
        first = {(row.task, row.method, row.failed): row.item for row in reversed(failed)}
        yield Heading("Failures")
        rows = [
            [task, method, _short(str(error)), first[task, method, error], str(n)]
            for (task, method, error), n in counts.most_common()
        ]
        yield Table(["task", "method", "error", "first item", "items"], rows, named=4)


def samples(name: str, rows: Sequence[Prediction]) -> Iterator[Block]:
    """One item for each of the commonest ways in which the methods disagree, with the first seed's answers."""
    items: dict[str, dict[str, Prediction]] = {}
    for row in rows:
        items.setdefault(row.item, {}).setdefault(row.method, row)
    ways: dict[tuple[tuple[str, bool], ...], list[str]] = {}
    for item, answers in items.items():
        ways.setdefault(tuple(sorted((method, one.score >= RIGHT) for method, one in answers.items())), []).append(item)
    disagreeing = [way for way in ways if len({right for _, right in way}) > 1]
    if disagreeing:
        yield Heading(f"Sample answers: {name}")
        yield Text("One item for each of the commonest ways in which the methods disagree; first fuser seed.")
    for way in sorted(disagreeing, key=lambda way: -len(ways[way]))[:SAMPLES]:
        item = ways[way][0]
        asked = next((row.question for row in rows if row.item == item and row.question), None)
        yield Heading(_short(asked) if asked else f"Item {item}", level=3)
        yield _answers(list(items[item].values()), len(ways[way]))


def _answers(rows: Sequence[Prediction], alike: int) -> Table:
    """Who gave which answer, the right ones first."""
    given: dict[tuple[float, str], list[str]] = {}
    for row in sorted(rows, key=lambda row: -row.score):
        given.setdefault((row.score, row.failed or row.answer), []).append(row.method)
    cells = [
        [_short(answer) or "(nothing)", ", ".join(methods), f"{100 * score:.0f}"]
        for (score, answer), methods in given.items()
    ]
    return Table(
        [f"answer (right: {_short(rows[0].target)}; {alike:,} items like this)", "given by", "score"], cells, named=2
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= CHARACTERS else f"{line[:CHARACTERS]}…"
