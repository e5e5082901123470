"""``kvfuse demo``: the table, some questions side by side, the figures as JSON."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvfuse.demo.pair_folder import SHIPPED, PairFolder
from kvfuse.demo.questions import KINDS
from kvfuse.demo.score import METHODS, OPTIONS, as_prompt, figures, held_out, make_methods, score
from kvfuse.errors import PromptError
from kvfuse.evaluation.predictions import Prediction
from kvfuse.evaluation.report import document
from kvfuse.evaluation.report.verdict import FUSED, points
from kvfuse.support.files import write_file

SIDE_BY_SIDE = ("receiver", "sharer", "text-to-text", "cache-to-cache")
CONTROLS = ("zeroed", "mismatched")
RIVALS = ("receiver", "sharer", "text-to-text", "routing", "cascade")
METHODS_PER_SEED = ("cache-to-cache", *CONTROLS)


def run(
    path: Path | None = None,
    json_file: Path | None = None,
    seeds: Sequence[int] | None = None,
    limit: int | None = None,
) -> None:
    """Score every method on the held-out questions and print the result.

    Args:
        path: A pair's folder; by default the shipped one.
        json_file: File for all figures.
        seeds: Fusers to score; by default all.
        limit: Number of questions; by default all.
    """
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)  # where it cannot be written, say so before the work
    torch.set_num_threads(1)  # fastest for models this small
    folder, console = PairFolder(path or SHIPPED), _console()
    seeds, questions = list(seeds or folder.seeds), held_out(folder, limit)
    # 1) score
    columns = TextColumn("{task.description:15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        runs = len(METHODS) + (len(seeds) - 1) * len(METHODS_PER_SEED)
        task = bar.add_task("loading", total=runs * len(questions))
        scored = score(folder, seeds, questions, lambda name, done: bar.update(task, advance=done, description=name))
        bar.update(task, description="done")
    # 2) show
    record = figures(scored)
    console.print(table(record))
    for line in reading(record):
        console.print(line, highlight=False)
    console.print(side_by_side(scored.predictions))
    if json_file is not None:
        write_file(json_file, json.dumps(record, indent=2) + "\n")


def answer_one(question: str, path: Path | None = None) -> None:
    """Ask all methods but the controls, which need other questions, a single question.

    Raises:
        PromptError: The question is empty.
    """
    if not question.strip():
        raise PromptError("expected a question, got an empty one; ask for example 'What currency is used in Norway?'")
    folder, console = PairFolder(path or SHIPPED), _console()
    answers = _table(["method", "answer", "ms", "tokens"])
    for name, method in make_methods(folder, folder.seeds[0], []).items():
        if name not in CONTROLS:
            method.generate([as_prompt(question)], **OPTIONS)  # warm-up
            answer = method.generate([as_prompt(question)], **OPTIONS)[0]
            answers.add_row(name, answer.text, f"{answer.seconds * 1000:.0f}", str(answer.tokens))
    console.print(answers)


def rows(record: dict[str, Any]) -> list[list[str]]:
    """Returns the table as text: a header, then the methods with accuracies in % (all and by kind), time and tokens."""
    # a small sample may lack a kind
    kinds = [kind for kind in KINDS if kind in record["kinds"]]
    out = [["method", "all [95%]", *kinds, "median ms", "tokens"]]
    for name, method in record["methods"].items():
        shares = [f"{100 * record['kinds'][kind][name]:.1f}" for kind in kinds]
        cost = [f"{1000 * method['median_seconds']:.0f}", f"{method['generated_tokens']:.1f}"]
        out.append([name, points(method["accuracy"], method["interval"]), *shares, *cost])
    return out


def table(record: dict[str, Any]) -> Table:
    """Returns :func:`rows` for a terminal."""
    asked = f"{record['questions']} questions about places no fuser has seen"
    seeds = "1 seed" if len(record["seeds"]) == 1 else f"{len(record['seeds'])} seeds"
    header, *body = rows(record)
    out = _table(header, title=f"{asked}, fusers of {seeds}, accuracy in %")
    for column in out.columns[1:]:
        column.justify = "right"
    for row in body:
        out.add_row(*row, style="bold" if row[0] == FUSED else None)
    return out


def markdown(record: dict[str, Any]) -> str:
    """Returns :func:`rows` and :func:`reading` for the README."""
    header, *body = rows(record)
    return "\n".join([document.to_markdown([document.Table(header, body)]), *(f"- {line}" for line in reading(record))])


def reading(record: dict[str, Any]) -> list[str]:
    """Returns the table in words."""
    seconds = {name: method["median_seconds"] for name, method in record["methods"].items()}
    # nothing is kept where the receiver knows nothing, as in a small sample
    share = "" if record["kept"] is None else f"{100 * record['kept']:.1f}%"
    kept = f"Of what the receiver alone answers right, cache-to-cache keeps {share}."
    gains = ", ".join(f"{_points(record['gains'][name])} over {name}" for name in RIVALS)
    over_receiver, over_text = (seconds[FUSED] / seconds[name] for name in ("receiver", "text-to-text"))
    return [
        *([kept] if share else []),
        f"Cache-to-cache gains {gains} (points, paired 95% intervals).",
        f"A sharer that read another question: {_points(record['mismatched_over_receiver'])} points over the receiver.",
        f"Median time: {over_receiver:.2f} x the receiver's, {over_text:.2f} x text-to-text's.",
    ]


def side_by_side(predictions: Sequence[Prediction]) -> Table:
    """Returns a question of each kind that cache-to-cache answers right, and one that it answers wrong."""
    answers: dict[str, dict[str, Prediction]] = {}  # by method and question, of the first seed
    for row in predictions:
        answers.setdefault(row.method, {}).setdefault(row.item, row)
    # the first of each kind, so that the same questions are shown every time
    fused = answers[FUSED].values()
    chosen = [next((row for row in fused if row.category == kind and row.score), None) for kind in KINDS]
    chosen.append(next((row for row in fused if not row.score), None))
    out = _table(
        ["question", "answer", *SIDE_BY_SIDE],
        title="Side by side",
        box=box.HORIZONTALS,
        padding=(0, 1),
        show_lines=True,
    )
    for row in filter(None, chosen):
        out.add_row(row.question, row.target, *(answers[name][row.item].answer for name in SIDE_BY_SIDE))
    return out


def _console() -> Console:
    """A console whose text is plain where the user sets NO_COLOR (rich would keep bold)."""
    return Console(color_system=None if os.environ.get("NO_COLOR") else "auto")


def _table(header: Sequence[str], title: str | None = None, **options: Any) -> Table:
    """A table that 80 columns hold whole: narrow headers, and cells that are wrapped, never cut."""
    out = Table(
        title=title,
        **{"title_justify": "left", "header_style": "bold", "box": None, "padding": (0, 1, 0, 0), **options},
    )
    for name in header:
        lines = name.replace(" ", "\n").replace("-", "-\n").replace("-\nto", "-to")  # sharer-|knows, cache-to-|cache
        out.add_column(lines, overflow="fold", no_wrap=name == "method")
    return out


def _points(gain: dict[str, Any]) -> str:
    return points(gain["difference"], gain["interval"], signed=True)
