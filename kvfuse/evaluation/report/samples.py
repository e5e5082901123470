"""Single answers of a run: where methods disagree, and which questions failed."""

from collections import Counter
from collections.abc import Iterator, Sequence

from kvfuse.evaluation.predictions import Prediction
from kvfuse.evaluation.report.document import Block, Heading, Table, Text
from kvfuse.evaluation.scoring.task_scores import RIGHT

MAX_SAMPLES, MAX_CHARACTERS = 6, 240


def failures(predictions: Sequence[Prediction]) -> Iterator[Block]:
    """Yields a table of the errors with their counts; nothing where nothing failed."""
    failed = [row for row in predictions if row.failed is not None]
    if failed:
        # the same error of many items is listed once, with its first item
        counts = Counter((row.task, row.method, str(row.failed)) for row in failed)
        first = {(row.task, row.method, str(row.failed)): row.item for row in reversed(failed)}
        rows = [[*key[:2], _short(key[2]), first[key], str(count)] for key, count in counts.most_common()]
        yield Heading("Failures")
        yield Table(["task", "method", "error", "first item", "items"], rows, named=4)


def samples(name: str, rows: Sequence[Prediction]) -> Iterator[Block]:
    """Yields one item for each of the most common patterns of disagreement, with the first seed's answers."""
    items: dict[str, dict[str, Prediction]] = {}
    for row in rows:
        items.setdefault(row.item, {}).setdefault(row.method, row)
    # a pattern is which methods are right, and which are not
    patterns: dict[tuple[tuple[str, bool], ...], list[str]] = {}
    for item, answers in items.items():
        pattern = tuple(sorted((method, row.score >= RIGHT) for method, row in answers.items()))
        if len({right for _, right in pattern}) > 1:
            patterns.setdefault(pattern, []).append(item)
    if patterns:
        yield Heading(f"Sample answers: {name}")
        yield Text("One item for each of the most common patterns of disagreement between methods; first fuser seed.")
    for alike in sorted(patterns.values(), key=len, reverse=True)[:MAX_SAMPLES]:
        # one row with the question is enough
        question = next((row.question for row in rows if row.item == alike[0] and row.question), None)
        yield Heading(_short(question) if question else f"Item {alike[0]}", level=3)
        yield _answers(list(items[alike[0]].values()), len(alike))


def _answers(rows: Sequence[Prediction], alike: int) -> Table:
    """Returns which methods gave which answer, the right ones first."""
    given: dict[tuple[float, str], list[str]] = {}
    for row in sorted(rows, key=lambda row: -row.score):
        # methods that give the same answer share a line
        given.setdefault((row.score, row.failed or row.answer), []).append(row.method)
    cells = [
        [_short(answer) or "(nothing)", ", ".join(methods), f"{100 * score:.0f}"]
        for (score, answer), methods in given.items()
    ]
    header = [f"answer (right: {_short(rows[0].target)}; {alike:,} items like this)", "given by", "score"]
    return Table(header, cells, named=2)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_CHARACTERS else f"{line[:MAX_CHARACTERS]}…"
