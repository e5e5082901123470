"""Several runs side by side, with paired differences between them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvfuse.errors import EvaluationError
from kvfuse.evaluation.predictions import Published, Run, read_run
from kvfuse.evaluation.report.document import Block, Facts, Heading, Table, Text, to_html, to_markdown
from kvfuse.evaluation.report.published_figures import select, with_published
from kvfuse.evaluation.report.verdict import points
from kvfuse.evaluation.report.write import accuracy_cell, notes
from kvfuse.evaluation.scoring.metrics import Figures, metrics, paired
from kvfuse.evaluation.scoring.task_scores import TaskScores, by_task
from kvfuse.support.files import write_file


def write_comparison(folders: Sequence[str | Path], page: str | Path) -> None:
    """Set runs side by side and write the comparison as a page, and as Markdown in the same folder.

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
    """Yields the comparison's blocks, in order.

    Args:
        runs: Two or more.
        names: Of the runs.
    """
    # 1) figures of every run, then task by task
    records, scores = [metrics(run) for run in runs], [by_task(run.predictions) for run in runs]
    yield Heading(f"Evaluation: {', '.join(names)}", level=1)
    yield from notes(runs)
    yield Facts({name: ", ".join(record["tasks"]) for name, record in zip(names, records, strict=True)})
    for task in dict.fromkeys(task for record in records for task in record["tasks"]):
        figures = [record["tasks"].get(task) for record in records]
        published = [[row for row in run.published if row.task == task] for run in runs]
        yield Heading(task)
        yield from _accuracies(figures, names, published)
        yield from _differences([run_scores.get(task) for run_scores in scores], names)
    # 2) time, and the reasons why figures may differ
    if any(record["latency"] for record in records):
        yield from _latency([record["latency"] for record in records], names)
    yield from _configurations([run.config for run in runs], names)


def _accuracies(
    figures: Sequence[Figures | None], names: Sequence[str], published: Sequence[Sequence[Published]]
) -> Iterator[Block]:
    # measured methods first, then those that only a paper has
    methods = [method for task in figures if task for method in task["methods"]]
    methods += [row.method for rows in published for row in select(rows)]
    table = []
    for method in dict.fromkeys(methods):
        cells = [accuracy_cell(task["methods"].get(method) if task else None) for task in figures]
        quoted = [with_published(cell, select(rows, method)) for cell, rows in zip(cells, published, strict=True)]
        table.append([method, *quoted])
    yield Table(["score, % [95%]", *names], table)
    if any(map(select, published)):
        yield Text(
            "After a slash: published. Each run's own report has the sources, and why rows cannot be run as published."
        )
    for name, task in zip(names, figures, strict=True):
        if task:
            yield Text(task["verdict"], lead=f"{name}.")


def _differences(scores: Sequence[TaskScores | None], names: Sequence[str]) -> Iterator[Block]:
    """Yields the later runs minus the first; where their items differ, a note in place of a table."""
    before, first = scores[0], names[0]
    for after, name in zip(scores[1:], names[1:], strict=True):
        if before is None or after is None:
            continue
        # differences of other items would not be paired
        if before.items.keys() != after.items.keys():
            common = len(before.items.keys() & after.items.keys())
            counts = (
                f"{len(before.items):,} items in {first}, {len(after.items):,} in {name}, {common:,} of them the same"
            )
            yield Text(f"{counts}: no paired differences, the accuracies are of different items.")
            continue
        # methods that only one of the runs has are left out
        gains = {method: _gain(before, after, method) for method in before.scores}
        rows = [[method, points(*gain, signed=True)] for method, gain in gains.items() if gain]
        if rows:
            yield Heading(f"{name} minus {first}", level=3)
            yield Table(["method", "difference, points [95%]"], rows)
        if changed := sum(before.items[item].prompt_hash != row.prompt_hash for item, row in after.items.items()):
            yield Text(f"The items are the same, but {changed:,} of them were asked in other words.")


def _gain(before: TaskScores, after: TaskScores, method: str) -> tuple[float, tuple[float, float]] | None:
    """Returns a method's scores in ``after`` minus those in ``before``, on the items answered in both."""
    if method not in before.scores or method not in after.scores:
        return None
    # the items of both runs in the order of the first
    column = {item: index for index, item in enumerate(after.items)}
    order = [column[item] for item in before.items]
    answered = before.answered(method) & after.answered(method)[order]
    if not answered.any():
        return None
    gain = paired((after.mean(method)[order] - before.mean(method))[answered], before.groups[answered])
    return gain["difference"], gain["interval"]


def _latency(latencies: Sequence[Figures], names: Sequence[str]) -> Iterator[Block]:
    names_of_methods = dict.fromkeys(name for methods in latencies for name in methods)
    medians = [{name: f"{1000 * method['median']:.1f}" for name, method in methods.items()} for methods in latencies]
    yield Heading("Latency")
    yield Text("Medians of single questions. They compare methods of a run; runs only where the machine was the same.")
    rows = [[name, *(median.get(name, "-") for median in medians)] for name in names_of_methods]
    yield Table(["median ms", *names], rows)


def _configurations(configs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[Block]:
    """Yields the keys in which the runs differ."""
    # nested keys -> dotted ones, e.g. evaluation.limit
    flat = [dict(_leaves(config)) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [[key, *(config.get(key, "-") for config in flat)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    yield Heading("Configuration")
    yield Table(["key", *names], differing, named=1 + len(names)) if differing else Text("The same in all runs.")


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _names(folders: Sequence[str | Path]) -> list[str]:
    """Returns the last parts of the folders' paths, or the whole paths where two parts are the same."""
    short = [Path(folder).resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else list(map(str, folders))
