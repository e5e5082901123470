"""A run's folder -> ``metrics.json``, ``report.html`` and ``report.md``: verdict first, then every figure it rests on."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kvfuse.evaluation.predictions import METRICS, Published, Run, read_run
from kvfuse.evaluation.report import figures
from kvfuse.evaluation.report.document import Block, Code, Facts, Heading, Picture, Table, Text, to_html, to_markdown
from kvfuse.evaluation.report.published_figures import beside, select, sources
from kvfuse.evaluation.report.samples import failures, samples
from kvfuse.evaluation.report.verdict import FUSED, RECEIVER, SHARER, difference, points
from kvfuse.evaluation.scoring.metrics import Figures, all_phases, metrics
from kvfuse.support.files import write_file
from kvfuse.support.plots import svg

HTML, MARKDOWN = "report.html", "report.md"
FEW_CATEGORIES = 12
"""With more of them, only receiver, sharer and cache-to-cache are drawn by category; the table has all methods."""


def write_report(folder: str | Path) -> Figures:
    """Work out all figures of a run and write them into its folder, as numbers, as a page and as Markdown.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        EvaluationError: See :func:`kvfuse.evaluation.predictions.read_run`.
    """
    run = read_run(folder)
    record = metrics(run)
    blocks = list(report(run, record))
    write_file(Path(folder) / METRICS, json.dumps(record, indent=2, allow_nan=False) + "\n")
    write_file(Path(folder) / MARKDOWN, to_markdown(blocks))
    write_file(Path(folder) / HTML, to_html(blocks))
    return record


def report(run: Run, record: Figures) -> Iterator[Block]:
    """The report's blocks, in order.

    Args:
        run: What was asked and answered.
        record: Its figures, from :func:`kvfuse.evaluation.scoring.metrics.metrics`.
    """
    yield Heading(f"Evaluation: {run.name}", level=1)
    yield from notes([run])
    yield Facts(_facts(run, record))
    yield Heading("Verdict")
    yield from _verdicts(record)
    if record["average"]:
        yield Heading("Mean over tasks")
        rows = [[name, accuracy_cell(one), _gain_cell(one.get("gain"))] for name, one in record["average"].items()]
        yield Table(["method", "mean score, % [95%]", "gain over the receiver [95%]"], rows)
    for name, task in record["tasks"].items():
        yield from _task(name, task, [one for one in run.published if one.task == name and one.unit == "%"])
    if record["latency"]:
        yield from _latency(record["latency"], [one for one in run.published if one.unit != "%"])
    yield from failures(run.predictions)
    for name in record["tasks"]:
        yield from samples(name, [row for row in run.predictions if row.task == name])
    yield Heading("How to read it")
    yield from _explanations(graded=any(task["graded"] for task in record["tasks"].values()))
    yield Heading("Configuration")
    yield Code(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "not recorded")


def notes(runs: Sequence[Run]) -> Iterator[Block]:
    """What a reader of these runs must know first."""
    for note in dict.fromkeys(run.note for run in runs if run.note):
        yield Text(note, lead="Note.")


def accuracy_cell(one: Mapping[str, Any] | None) -> str:
    """A method's accuracy with its interval, or a dash where it was not run."""
    return points(one["accuracy"], one["interval"]) if one else "-"


def _facts(run: Run, record: Figures) -> dict[str, str]:
    facts = {key: _name(run.config[key]) for key in ("receiver", "sharer", "sharers", "fuser") if run.config.get(key)}
    facts["tasks"] = "; ".join(_counted(name, task) for name, task in record["tasks"].items())
    facts["methods"] = ", ".join(dict.fromkeys(row.method for row in run.predictions))
    if seeds := sorted({row.seed for row in run.predictions if row.seed is not None}):
        facts["fuser seeds"] = ", ".join(map(str, seeds))
    return {**facts, **{name: str(version) for name, version in run.versions.items()}}


def _name(value: Any) -> str:
    """A model or fuser as a configuration has it: a name, several, or keys with values."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_name(one)}" for key, one in value.items())
    return ", ".join(map(_name, value)) if isinstance(value, list) else str(value)


def _counted(name: str, task: Figures) -> str:
    about = f" in {task['groups']:,} groups" if task["groups"] < task["items"] else ""
    return f"{name} ({task['items']:,} items{about})"


def _verdicts(record: Figures) -> Iterator[Block]:
    """And what a reader must know before believing them."""
    tasks = record["tasks"]
    for name, task in tasks.items():
        yield Text(task["verdict"], lead=f"{name}.")
    methods = [(task, one) for task in tasks.values() for one in task["methods"].values()]
    if failed := sum(one["failed"] for _, one in methods):
        yield Text(f"{failed:,} failed. They count as wrong and are listed below.", lead="Failures.")
    if any(one["items"] < task["items"] for task, one in methods):
        yield Text(
            "Not finished: some methods have not answered every item with every seed. Figures are of the items that they have."
        )


def _task(name: str, task: Figures, published: Sequence[Published]) -> Iterator[Block]:
    measure = "score" if task["graded"] else "accuracy"
    axis = f"{measure} (%), 95% interval"
    yield Heading(_counted(name, task))
    yield _methods_table(task, measure, {one.method: one for one in select(published)})
    yield from sources(published)
    estimates = [(method, one["accuracy"], one["interval"]) for method, one in task["methods"].items()]
    yield Picture(svg(figures.forest(estimates, axis), f"{name} methods"), f"{name}: {measure} of each method.")
    if task["pairs"]:
        yield from _differences(name, task)
    if task["overlap"]:
        yield from _overlap(name, task)
    if task["categories"]:
        yield from _categories(name, task, axis, published)


def _methods_table(task: Figures, measure: str, published: Mapping[str, Published]) -> Table:
    header = [
        "method",
        f"{measure}, % [95%]",
        "seeds",
        "kept of receiver's",
        "kept of sharer's",
        "items",
        "failed",
        "not read",
    ]
    rows = []
    for name in dict.fromkeys([*task["methods"], *published]):
        one = task["methods"].get(name)
        rows.append([name, accuracy_cell(one), *(_method_cells(one) if one else ["-"] * 6)])
        if published:
            rows[-1].append(f"{published[name].value:.1f}" if name in published else "-")
    return Table([*header, "published"] if published else header, rows)


def _method_cells(one: Figures) -> list[str]:
    seeds = [f"{100 * share:.1f}" for share in one["seeds"].values()]
    kept = [f"{100 * one['kept'][other]['share']:.1f}" if other in one["kept"] else "-" for other in (RECEIVER, SHARER)]
    return [" ".join(seeds) or "-", *kept, f"{one['items']:,}", str(one["failed"]), str(one["unread"])]


def _differences(name: str, task: Figures) -> Iterator[Block]:
    pairs = _ordered_pairs(task)
    header = ["pair", "difference, points [95%]", "helped", "hurt", "McNemar p", "p, Holm", "items"]
    yield Heading("Differences", level=3)
    yield Table(header, [[_pair_name(one), _gain_cell(one), *_pair_cells(one)] for one in pairs])
    shown = [one for one in pairs if one["method"] == FUSED or one["against"] == RECEIVER] or pairs
    gains = [(_pair_name(one), one["difference"], one["interval"]) for one in shown]
    drawn = figures.forest(gains, "difference (points), 95% interval", zero=True)
    yield Picture(svg(drawn, f"{name} pairs"), f"{name}: paired differences; hollow: not told from zero.")


def _ordered_pairs(task: Figures) -> list[Figures]:
    """Every pair once: cache-to-cache minus the others, the others minus the receiver, then the rest."""
    methods = [name for name in task["methods"] if name not in (FUSED, RECEIVER)]
    wanted = [(FUSED, RECEIVER), *((FUSED, name) for name in methods), *((name, RECEIVER) for name in methods)]
    wanted += [(one["method"], one["against"]) for one in task["pairs"]]
    once: dict[frozenset[str], tuple[str, str]] = {}
    for pair in wanted:
        once.setdefault(frozenset(pair), pair)
    return [found for pair in once.values() if (found := difference(task, *pair))]


def _pair_name(one: Figures) -> str:
    return f"{one['method']} - {one['against']}"


def _pair_cells(one: Figures) -> list[str]:
    counts = [figures.number(one["helped"]), figures.number(one["hurt"])]
    return [*counts, *("<0.0001" if p < 1e-4 else f"{p:.4f}" for p in (one["p"], one["p_holm"])), f"{one['items']:,}"]


def _gain_cell(gain: Figures | None) -> str:
    return points(gain["difference"], gain["interval"], signed=True) if gain else "-"


def _overlap(name: str, task: Figures) -> Iterator[Block]:
    methods, regions = task["overlap"]["methods"], task["overlap"]["regions"]
    averaged = " Averages over the fuser's seeds." if len(task["methods"][FUSED]["seeds"]) > 1 else ""
    yield Heading("Who has which items right", level=3)
    if RECEIVER in methods:
        two = _without_sharer(regions)
        caption = f"{name}: fusing hurt {figures.number(two[RECEIVER])} items and helped {figures.number(two[FUSED])}. Areas to scale.{averaged}"
        yield Picture(svg(figures.venn([RECEIVER, FUSED], two), f"{name} two"), caption)
    if len(methods) == 3:
        yield Picture(
            svg(figures.venn(methods, regions), f"{name} three"), f"{name}: with the sharer. Not to scale.{averaged}"
        )
    rows = [[region.replace("+", " and ") or "nobody", figures.number(count)] for region, count in regions.items()]
    yield Table(["right, and nobody else of these", "items"], rows)


def _without_sharer(regions: Mapping[str, float]) -> dict[str, float]:
    two = {"": 0.0, RECEIVER: 0.0, FUSED: 0.0, f"{RECEIVER}+{FUSED}": 0.0}
    for region, count in regions.items():
        two["+".join(one for one in region.split("+") if one in (RECEIVER, FUSED))] += count
    return two


def _categories(name: str, task: Figures, axis: str, published: Sequence[Published]) -> Iterator[Block]:
    methods, categories = list(task["methods"]), task["categories"]
    yield Heading("By category", level=3)
    rows = []
    for category, one in categories.items():
        cells = [
            f"{100 * one['methods'][method]['accuracy']:.1f}" if method in one["methods"] else "-" for method in methods
        ]
        quoted = [
            beside(cell, select(published, method, part=category)) for method, cell in zip(methods, cells, strict=True)
        ]
        rows.append([category, f"{one['items']:,}", *quoted])
    yield Table(["category", "items", *methods], rows)
    drawn = (
        methods
        if len(rows) <= FEW_CATEGORIES
        else [one for one in methods if one in (RECEIVER, SHARER, FUSED)] or methods[:3]
    )
    yield Picture(
        svg(figures.by_category(figures.shares(categories, drawn), axis), f"{name} categories"), f"{name}: by category."
    )


def _latency(latency: Figures, published: Sequence[Published]) -> Iterator[Block]:
    phases = all_phases(latency)
    asked = max(one["questions"] for one in latency.values())
    yield Heading("Latency")
    yield Text(
        f"{asked:,} questions asked one at a time, warm, the methods by turns. p95: the 95th percentile. Phases: means in ms."
    )
    header = [
        "method",
        "median ms",
        "p95 ms",
        *(phase.replace("_", " ") for phase in phases),
        "other",
        "tokens in",
        "out",
    ]
    yield Table(
        header, [[name, *_latency_cells(name, one, [*phases, "other"], published)] for name, one in latency.items()]
    )
    if published:
        told = "; ".join(dict.fromkeys(one.source for one in published))
        yield Text(
            f"{told}. Its times are of its own machine: compare them with each other, not with those measured here.",
            lead="Published:",
        )
    yield Picture(svg(figures.latency(latency, phases), "latency"), "Where the time of a question goes.")


def _latency_cells(name: str, one: Figures, phases: Sequence[str], published: Sequence[Published]) -> list[str]:
    spent = figures.stack(one)
    times = [
        beside(f"{spent[phase]:.1f}" if phase in spent else "-", select(published, name, "ms", phase))
        for phase in phases
    ]
    counts = {
        part: "-" if one[key] is None else f"{one[key]:.1f}" for part, key in (("in", "tokens_in"), ("out", "tokens"))
    }
    tokens = [beside(count, select(published, name, "tokens", part)) for part, count in counts.items()]
    return [
        beside(f"{1000 * one['median']:.1f}", select(published, name, "ms")),
        f"{1000 * one['p95']:.1f}",
        *times,
        *tokens,
    ]


def _explanations(graded: bool) -> Iterator[Block]:
    yield Text(
        "Intervals hold 95%. An accuracy's is Wilson's where items are independent and each is right or wrong. Else, and for differences, "
        "items are resampled 2,000 times, in whole groups where several are about the same thing. With several fuser seeds an item's score "
        "is its mean over seeds: intervals are about other items, not about other seeds, whose accuracies stand beside them."
    )
    threshold = " A graded item is right from a score of 50 on." if graded else ""
    yield Text(
        "Helped: only the first of a pair has it right; hurt: only the second. Kept: of what the receiver, or the sharer, has right alone, "
        f"the share that the method has right too.{threshold} McNemar's exact test counts each item once, for the side of most of its "
        "seeds, and as independent: where items come in groups, trust the interval. Holm's p-values allow for all pairs of the task having "
        "been looked at."
    )
    yield Text(
        "Mismatched: the sharer has read another question. Cache-to-cache minus mismatched is what needs the sharer to have read this one; "
        "the rest of a gain is what any cache does, such as removing a preference for an answer letter. Failed: no answer, counted as "
        "wrong. Not read: there is an answer, but nothing could be extracted from it. Behind a stroke: what a paper has."
    )
