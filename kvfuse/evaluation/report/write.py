"""A run's folder -> ``metrics.json``, ``report.html`` and ``report.md``: the verdict, then all figures behind it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from kvfuse.evaluation.predictions import METRICS, Published, Run, read_run
from kvfuse.evaluation.report import figures
from kvfuse.evaluation.report.document import Block, Code, Facts, Heading, Picture, Table, Text, to_html, to_markdown
from kvfuse.evaluation.report.published_figures import select, sources, with_published
from kvfuse.evaluation.report.samples import failures, samples
from kvfuse.evaluation.report.verdict import FUSED, RECEIVER, SHARER, difference, points
from kvfuse.evaluation.scoring.audit import table as audit_table
from kvfuse.evaluation.scoring.metrics import Figures, all_phases, metrics
from kvfuse.support.files import write_file
from kvfuse.support.plots import svg

HTML, MARKDOWN = "report.html", "report.md"
FEW_CATEGORIES = 12
"""With more categories, only receiver, sharer and cache-to-cache are drawn; the table has all methods."""


def write_report(folder: str | Path) -> Figures:
    """Compute all figures of a run and write them into its folder, as numbers, as a page and as Markdown.

    Returns:
        The content of ``metrics.json``.

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
    """Yields the report's blocks, in order.

    Args:
        run: Predictions, timings and configuration.
        record: Its figures, from :func:`kvfuse.evaluation.scoring.metrics.metrics`.
    """
    # 1) the summary: models, verdicts, mean over tasks
    yield Heading(f"Evaluation: {run.name}", level=1)
    yield from notes([run])
    yield Facts(_facts(run, record))
    yield Heading("Verdict")
    yield from _verdicts(record)
    if record["average"]:
        yield Heading("Mean over tasks")
        rows = [[name, accuracy_cell(mean), _gain_cell(mean.get("gain"))] for name, mean in record["average"].items()]
        yield Table(["method", "mean score, % [95%]", "gain over the receiver [95%]"], rows)
    # 2) the figures of each task, and of time
    for name, task in record["tasks"].items():
        yield from _task(name, task, [row for row in run.published if row.task == name and row.unit == "%"])
    if record["latency"]:
        yield from _latency(record["latency"], [row for row in run.published if row.unit != "%"])
    # 3) single answers, and how all of it was made
    yield from failures(run.predictions)
    for name in record["tasks"]:
        yield from samples(name, [row for row in run.predictions if row.task == name])
    yield Heading("How to read it")
    explanation = files(__package__).joinpath("how_to_read.txt").read_text(encoding="utf-8")
    yield from map(Text, explanation.split("\n\n"))
    yield Heading("Configuration")
    yield Code(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "not recorded")


def notes(runs: Sequence[Run]) -> Iterator[Block]:
    """Yields the notes of these runs' configurations, each once."""
    for note in dict.fromkeys(run.note for run in runs if run.note):
        yield Text(note, lead="Note.")


def accuracy_cell(method: Mapping[str, Any] | None) -> str:
    """Returns a method's accuracy with its interval, or a dash where it was not run."""
    return points(method["accuracy"], method["interval"]) if method else "-"


def _facts(run: Run, record: Figures) -> dict[str, str]:
    # a configuration names one or several of each
    facts = {key: _name(run.config[key]) for key in ("receiver", "sharer", "sharers", "fuser") if run.config.get(key)}
    facts["tasks"] = "; ".join(_title(name, task) for name, task in record["tasks"].items())
    facts["methods"] = ", ".join(dict.fromkeys(row.method for row in run.predictions))
    if seeds := sorted({row.seed for row in run.predictions if row.seed is not None}):
        facts["fuser seeds"] = ", ".join(map(str, seeds))
    return {**facts, **{name: str(version) for name, version in run.versions.items()}}


def _name(value: Any) -> str:
    """Returns a model or fuser of a configuration as text: a name, a list of names, or keys with values."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_name(part)}" for key, part in value.items())
    return ", ".join(map(_name, value)) if isinstance(value, list) else str(value)


def _title(name: str, task: Figures) -> str:
    groups = f" in {task['groups']:,} groups" if task["groups"] < task["items"] else ""
    return f"{name} ({task['items']:,} items{groups})"


def _verdicts(record: Figures) -> Iterator[Block]:
    """Yields the verdicts, then the reasons to distrust them: failures, missing answers."""
    tasks = record["tasks"]
    for name, task in tasks.items():
        yield Text(task["verdict"], lead=f"{name}.")
    # reasons to distrust all of them
    methods = [(task, method) for task in tasks.values() for method in task["methods"].values()]
    if failed := sum(method["failed"] for _, method in methods):
        yield Text(f"{failed:,} failed. They count as wrong and are listed below.", lead="Failures.")
    if any(method["items"] < task["items"] for task, method in methods):
        unfinished = "Not finished: some methods have not answered every item with every seed."
        yield Text(f"{unfinished} Figures are of the items that they have answered.")


def _task(name: str, task: Figures, published: Sequence[Published]) -> Iterator[Block]:
    # 1) methods
    measure = "score" if task["graded"] else "accuracy"
    axis = f"{measure} (%), 95% interval"
    yield Heading(_title(name, task))
    yield _methods_table(task, measure, {row.method: row for row in select(published)})
    yield from sources(published)
    estimates = [(label, method["accuracy"], method["interval"]) for label, method in task["methods"].items()]
    yield Picture(svg(figures.forest(estimates, axis), f"{name} methods"), f"{name}: {measure} of each method.")
    if task["audit"]:
        yield Heading("Audit", level=3)
        yield Text(task["audit"]["verdict"])
        yield Table(["figure", "points [95%]"], audit_table(task["audit"]))
    # 2) pairs of methods, their overlap, and categories, where there are several
    if task["pairs"]:
        yield from _differences(name, task)
    if task["overlap"]:
        yield from _overlap(name, task)
    if task["categories"]:
        yield from _categories(name, task, axis, published)


def _methods_table(task: Figures, measure: str, published: Mapping[str, Published]) -> Table:
    kept = ["kept of receiver's", "kept of sharer's"]
    header = ["method", f"{measure}, % [95%]", "seeds", *kept, "items", "failed", "not read"]
    rows = []
    # rows of the paper that were not run are listed, too
    for name in dict.fromkeys([*task["methods"], *published]):
        method = task["methods"].get(name)
        rows.append([name, accuracy_cell(method), *(_method_cells(method) if method else ["-"] * 6)])
        if published:
            rows[-1].append(f"{published[name].value:.1f}" if name in published else "-")
    return Table([*header, "published"] if published else header, rows)


def _method_cells(method: Figures) -> list[str]:
    seeds = " ".join(f"{100 * share:.1f}" for share in method["seeds"].values())
    kept = [method["kept"].get(other) for other in (RECEIVER, SHARER)]
    shares = [f"{100 * found['share']:.1f}" if found else "-" for found in kept]
    return [seeds or "-", *shares, f"{method['items']:,}", str(method["failed"]), str(method["unread"])]


def _differences(name: str, task: Figures) -> Iterator[Block]:
    pairs = _ordered_pairs(task)
    header = ["pair", "difference, points [95%]", "helped", "hurt", "McNemar p", "p, Holm", "items"]
    yield Heading("Differences", level=3)
    yield Table(header, [[_pair_name(pair), _gain_cell(pair), *_pair_cells(pair)] for pair in pairs])
    # the picture has the pairs that claims are about; the table has all
    drawn = [pair for pair in pairs if pair["method"] == FUSED or pair["against"] == RECEIVER] or pairs
    gains = [(_pair_name(pair), pair["difference"], pair["interval"]) for pair in drawn]
    picture = figures.forest(gains, "difference (points), 95% interval", zero=True)
    yield Picture(svg(picture, f"{name} pairs"), f"{name}: paired differences; hollow: the interval contains zero.")


def _ordered_pairs(task: Figures) -> list[Figures]:
    """Returns every pair once: cache-to-cache minus the others, the others minus the receiver, then the rest."""
    methods = [name for name in task["methods"] if name not in (FUSED, RECEIVER)]
    wanted = [(FUSED, RECEIVER), *((FUSED, name) for name in methods), *((name, RECEIVER) for name in methods)]
    wanted += [(pair["method"], pair["against"]) for pair in task["pairs"]]
    # a pair is listed in the first of the orders in which it is wanted
    unique: dict[frozenset[str], tuple[str, str]] = {}
    for names in wanted:
        unique.setdefault(frozenset(names), names)
    return [pair for names in unique.values() if (pair := difference(task, *names))]


def _pair_name(pair: Figures) -> str:
    return f"{pair['method']} - {pair['against']}"


def _pair_cells(pair: Figures) -> list[str]:
    p_values = ["<0.0001" if p < 1e-4 else f"{p:.4f}" for p in (pair["p"], pair["p_holm"])]
    return [figures.number(pair["helped"]), figures.number(pair["hurt"]), *p_values, f"{pair['items']:,}"]


def _gain_cell(gain: Figures | None) -> str:
    return points(gain["difference"], gain["interval"], signed=True) if gain else "-"


def _overlap(name: str, task: Figures) -> Iterator[Block]:
    methods, regions = task["overlap"]["methods"], task["overlap"]["regions"]
    yield Heading("Who has which items right", level=3)
    if RECEIVER in methods:
        averaged = " Averages over the fuser's seeds." if len(task["methods"][FUSED]["seeds"]) > 1 else ""
        known = figures.knowledge(methods, regions)
        # what the receiver knew and lost, and what it did not know and gained
        hurt = sum(items["wrong"] for knew, items in known.items() if RECEIVER in knew)
        helped = sum(items["right"] for knew, items in known.items() if RECEIVER not in knew)
        counts = f"fusing hurt {figures.number(hurt)} items and helped {figures.number(helped)}"
        yield Picture(svg(figures.overlap(known), f"{name} overlap"), f"{name}: {counts}.{averaged}")
    rows = [[region.replace("+", " and ") or "none", figures.number(count)] for region, count in regions.items()]
    yield Table(["right, the others wrong", "items"], rows)


def _categories(name: str, task: Figures, axis: str, published: Sequence[Published]) -> Iterator[Block]:
    methods, categories = list(task["methods"]), task["categories"]
    yield Heading("By category", level=3)
    rows = []
    for category, found in categories.items():
        shares = {name: f"{100 * method['accuracy']:.1f}" for name, method in found["methods"].items()}
        cells = [
            with_published(shares.get(method, "-"), select(published, method, part=category)) for method in methods
        ]
        rows.append([category, f"{found['items']:,}", *cells])
    yield Table(["category", "items", *methods], rows)
    # with many categories, lines of many methods would overlap
    main = [method for method in methods if method in (RECEIVER, SHARER, FUSED)] or methods[:3]
    drawn = figures.shares(categories, methods if len(rows) <= FEW_CATEGORIES else main)
    yield Picture(svg(figures.by_category(drawn, axis), f"{name} categories"), f"{name}: by category.")


def _latency(latency: Figures, published: Sequence[Published]) -> Iterator[Block]:
    phases = all_phases(latency)
    questions = max(method["questions"] for method in latency.values())
    yield Heading("Latency")
    asked = f"{questions:,} questions asked one at a time, warm, the methods in turns."
    yield Text(f"{asked} p95: the 95th percentile. Phases: means in ms.")
    columns = [*(phase.replace("_", " ") for phase in phases), "other", "tokens in", "out"]
    rows = [[name, *_latency_cells(name, method, [*phases, "other"], published)] for name, method in latency.items()]
    yield Table(["method", "median ms", "p95 ms", *columns], rows)
    if published:  # with a caveat, as published times are of other machines
        origins = "; ".join(dict.fromkeys(row.source for row in published))
        caveat = "These times are of another machine: compare them with each other, not with those measured here."
        yield Text(f"{origins}. {caveat}", lead="Published:")
    yield Picture(svg(figures.latency(latency, phases), "latency"), "Where the time of a question goes.")


def _latency_cells(name: str, method: Figures, phases: Sequence[str], published: Sequence[Published]) -> list[str]:
    # a method has no cell for the phases that it does not pass
    spent = {phase: f"{time:.1f}" for phase, time in figures.milliseconds(method).items()}
    times = [with_published(spent.get(phase, "-"), select(published, name, "ms", phase)) for phase in phases]
    counts = {"in": method["tokens_in"], "out": method["tokens"]}
    tokens = [
        with_published("-" if count is None else f"{count:.1f}", select(published, name, "tokens", part))
        for part, count in counts.items()
    ]
    median = with_published(f"{1000 * method['median']:.1f}", select(published, name, "ms"))
    return [median, f"{1000 * method['p95']:.1f}", *times, *tokens]
