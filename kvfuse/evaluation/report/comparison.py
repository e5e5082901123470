"""Several runs side by side, and how sure it is that they differ."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvfuse.errors import EvaluationError
from kvfuse.evaluation.predictions import Published, Run, read_run
from kvfuse.evaluation.report.document import Block, Facts, Heading, Table, Text, to_html, to_markdown
from kvfuse.evaluation.report.published_figures import beside, select
from kvfuse.evaluation.report.verdict import points
from kvfuse.evaluation.report.write import accuracy_cell, notes
from kvfuse.evaluation.scoring.metrics import Figures, metrics, paired
from kvfuse.evaluation.scoring.task_scores import TaskScores, by_task
from kvfuse.support.files import write_file


def write_comparison(folders: Sequence[str | Path], page: str | Path) -> None:
    """Set runs side by side and write it as a page, and as Markdown beside it.

    Args:
        folders: Of two or more runs; differences are to the first.
        page: The HTML file; the Markdown file has its name with ``.md``.

    Raises:
        EvaluationError: Fewer than two folders, or one that cannot be read.
    """
    if len(folders) < 2:
        raise EvaluationError(f"expected two or more runs to compare, got {len(folders)}; name another folder")
    runs = [read_run(folder) for folder in folders]
    blocks = list(comparison(runs, _names(folders)))
    write_file(Path(page).with_suffix(".md"), to_markdown(blocks))
    write_file(Path(page), to_html(blocks))


def comparison(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Block]:
    """The comparison's blocks, in order.

    Args:
        runs: Two or more.
        names: What to call them.
    """
    records = [metrics(run) for run in runs]
    tasks = [by_task(run.predictions) for run in runs]
    yield Heading(f"Evaluation: {', '.join(names)}", level=1)
    yield from notes(runs)
    yield Facts({name: ", ".join(record["tasks"]) for name, record in zip(names, records, strict=True)})
    for task in dict.fromkeys(task for record in records for task in record["tasks"]):
        yield Heading(task)
        published = [[one for one in run.published if one.task == task] for run in runs]
        yield from _task(
            [record["tasks"].get(task) for record in records], [one.get(task) for one in tasks], names, published
        )
    if any(record["latency"] for record in records):
        yield from _latency([record["latency"] for record in records], names)
    yield from _configurations([run.config for run in runs], names)


def _task(
    figures: Sequence[Figures | None],
    scores: Sequence[TaskScores | None],
    names: Sequence[str],
    published: Sequence[Sequence[Published]],
) -> Iterator[Block]:
    methods = list(dict.fromkeys(method for one in figures if one for method in one["methods"]))
    rows = []
    for method in dict.fromkeys([*methods, *(one.method for some in published for one in select(some))]):
        cells = [accuracy_cell(one["methods"].get(method) if one else None) for one in figures]
        rows.append(
            [method, *(beside(cell, select(some, method)) for cell, some in zip(cells, published, strict=True))]
        )
    yield Table(["score, % [95%]", *names], rows)
    if any(map(select, published)):
        yield Text(
            "Behind a stroke: published; each run's own report has the sources, and why rows cannot be run as published."
        )
    for name, one in zip(names, figures, strict=True):
        if one:
            yield Text(one["verdict"], lead=f"{name}.")
    first, *others = zip(names, scores, strict=True)
    for other in others:
        yield from _difference(first, other, methods)


def _difference(
    one: tuple[str, TaskScores | None], other: tuple[str, TaskScores | None], methods: Sequence[str]
) -> Iterator[Block]:
    """The later run minus the first, where they have asked the same items; else a note that says why not."""
    (first, before), (name, after) = one, other
    if before is None or after is None:
        return
    if before.items.keys() != after.items.keys():
        common = len(before.items.keys() & after.items.keys())
        counts = f"{len(before.items):,} items in {first}, {len(after.items):,} in {name}, {common:,} of them the same"
        yield Text(f"{counts}: no paired differences, the accuracies are of different items.")
        return
    rows = [[method, points(*gain, signed=True)] for method in methods if (gain := _paired(before, after, method))]
    if rows:
        yield Heading(f"{name} minus {first}", level=3)
        yield Table(["method", "difference, points [95%]"], rows)
    if changed := sum(before.items[item].prompt_hash != row.prompt_hash for item, row in after.items.items()):
        yield Text(f"The items are the same, but {changed:,} of them were asked in other words.")


def _paired(before: TaskScores, after: TaskScores, method: str) -> tuple[float, tuple[float, float]] | None:
    """One method's scores in a later run minus those in the first, on the items that both have answered."""
    if method not in before.scores or method not in after.scores:
        return None
    order = [list(after.items).index(item) for item in before.items]
    both = before.answered(method) & after.answered(method)[order]
    if not both.any():
        return None
    gain = paired((after.mean(method)[order] - before.mean(method))[both], before.groups[both])
    return gain["difference"], gain["interval"]


def _latency(latencies: Sequence[Figures], names: Sequence[str]) -> Iterator[Block]:
    methods = list(dict.fromkeys(method for one in latencies for method in one))
    cells = [
        [f"{1000 * one[method]['median']:.1f}" if method in one else "-" for one in latencies] for method in methods
    ]
    yield Heading("Latency")
    yield Text(
        "Medians of single questions; they compare methods of one run, and runs only where the machine was the same."
    )
    yield Table(["median ms", *names], [[method, *row] for method, row in zip(methods, cells, strict=True)])


def _configurations(configs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[Block]:
    """The keys in which the runs differ."""
    flat = [dict(_leaves(config)) for config in configs]
    keys = [
        key for key in dict.fromkeys(key for one in flat for key in one) if len({one.get(key, "-") for one in flat}) > 1
    ]
    yield Heading("Configuration")
    if keys:
        yield Table(
            ["key", *names], [[key, *(one.get(key, "-") for one in flat)] for key in keys], named=1 + len(names)
        )
    else:
        yield Text("The same in all runs.")


def _leaves(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", str(value)


def _names(folders: Sequence[str | Path]) -> list[str]:
    """Folders by their last part; by the whole path where two are alike."""
    short = [Path(folder).resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else list(map(str, folders))
