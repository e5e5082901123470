"""``kvfuse demo``: the table, a few questions side by side, the figures as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvfuse.demo.pair_folder import SHIPPED, PairFolder
from kvfuse.demo.questions import KINDS, Question
from kvfuse.demo.score import OPTIONS, Scores, as_prompt, figures, held_out, make_methods, score
from kvfuse.errors import PromptError
from kvfuse.support.files import write_file

SIDE_BY_SIDE = ("receiver", "sharer", "text-to-text", "cache-to-cache")
CONTROLS = ("zeroed", "mismatched")


def run(
    path: Path | None = None,
    json_file: Path | None = None,
    seeds: Sequence[int] | None = None,
    limit: int | None = None,
) -> None:
    """Score every method on the held-out questions and show it.

    Args:
        path: A pair's folder; by default the shipped one.
        json_file: Where to write all figures.
        seeds: Fusers to score; by default all.
        limit: So many questions; by default all.
    """
    torch.set_num_threads(1)  # fastest for models this small
    folder, console = PairFolder(path or SHIPPED), Console()
    seeds, questions = list(seeds or folder.seeds), held_out(folder, limit)
    with Progress(
        TextColumn("{task.description:15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as bar:
        runs = len(seeds) * 3 + 5
        task = bar.add_task("loading", total=runs * len(questions))
        scores = score(folder, seeds, questions, lambda name, done: bar.update(task, advance=done, description=name))
        bar.update(task, description="done")
    record = figures(scores, questions, seeds)
    console.print(table(record))
    for line in reading(record):
        console.print(line, highlight=False)
    console.print(stacked_layers(questions, scores))
    if json_file is not None:
        write_file(json_file, json.dumps(record, indent=2) + "\n")


def answer_one(question: str, path: Path | None = None) -> None:
    """Ask one question of every method that needs no other question.

    Raises:
        PromptError: The question is empty.
    """
    if not question.strip():
        raise PromptError("expected a question, got an empty one; ask for example 'What currency is used in Norway?'")
    folder, console = PairFolder(path or SHIPPED), Console()
    answers = Table("method", "answer", "ms", "tokens", box=None, header_style="bold")
    for name, method in make_methods(folder, folder.seeds[0], []).items():
        if name not in CONTROLS:
            method.generate([as_prompt(question)], **OPTIONS)  # warm
            answer = method.generate([as_prompt(question)], **OPTIONS)[0]
            answers.add_row(name, answer.text, f"{answer.seconds * 1000:.0f}", str(answer.tokens))
    console.print(answers)


def rows(record: dict[str, Any]) -> list[list[str]]:
    """The table as text, its header first: methods by accuracy in %, in all and by kind, with time and tokens."""
    kinds = [kind for kind in KINDS if kind in record["kinds"]]
    out = [["method", "all [95%]", *kinds, "median ms", "tokens"]]
    for name, one in record["methods"].items():
        low, high = one["interval"]
        shares = [f"{100 * record['kinds'][kind][name]:.1f}" for kind in kinds]
        timing = [f"{1000 * one['median_seconds']:.0f}", f"{one['generated_tokens']:.1f}"]
        out.append([name, f"{100 * one['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]", *shares, *timing])
    return out


def table(record: dict[str, Any]) -> Table:
    """:func:`rows` for a terminal."""
    title = f"{record['questions']} questions about places no fuser has seen, fusers of {len(record['seeds'])} seeds, accuracy in %"
    header, *body = rows(record)
    out = Table(*header, title=title, title_justify="left", header_style="bold")
    for column in out.columns[1:]:
        column.justify = "right"
    for row in body:
        out.add_row(*row, style="bold" if row[0] == "cache-to-cache" else None)
    return out


def markdown(record: dict[str, Any]) -> str:
    """:func:`rows` and :func:`reading` for the README."""
    header, *body = rows(record)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return (
        "\n".join(f"| {' | '.join(row)} |" for row in lines)
        + "\n\n"
        + "\n".join(f"- {line}" for line in reading(record))
    )


def reading(record: dict[str, Any]) -> list[str]:
    """What the table says, in words."""
    seconds = {name: one["median_seconds"] for name, one in record["methods"].items()}
    lines = []
    if record["kept"] is not None:
        lines.append(f"Of what the receiver alone answers right, cache-to-cache keeps {100 * record['kept']:.1f}%.")
    gains = ", ".join(
        f"{_points(record['gains'][name])} over {name}"
        for name in ("receiver", "sharer", "text-to-text", "routing", "cascade")
    )
    lines.append(f"Cache-to-cache gains {gains} (points, paired 95% intervals).")
    lines.append(
        f"A sharer that read another question: {_points(record['mismatched_over_receiver'])} points over the receiver."
    )
    ratios = seconds["cache-to-cache"] / seconds["receiver"], seconds["cache-to-cache"] / seconds["text-to-text"]
    lines.append(f"Median time: {ratios[0]:.2f} x the receiver's, {ratios[1]:.2f} x text-to-text's.")
    return lines


def stacked_layers(questions: Sequence[Question], scores: dict[str, Scores]) -> Table:
    """One question of each kind that cache-to-cache gets right, where there is one, and one that it gets wrong."""
    names = [name for name in SIDE_BY_SIDE if name in scores]
    out = Table(
        "question", "answer", *names, title="Side by side", title_justify="left", header_style="bold", show_lines=True
    )
    right = scores["cache-to-cache"].right[0]
    chosen = [next((i for i, one in enumerate(questions) if one.kind == kind and right[i]), None) for kind in KINDS]
    chosen.append(next((i for i in range(len(questions)) if not right[i]), None))
    for i in dict.fromkeys(place for place in chosen if place is not None):
        out.add_row(questions[i].text, questions[i].answer, *(scores[name].answers[i].text for name in names))
    return out


def _points(gain: dict[str, Any]) -> str:
    low, high = gain["interval"]
    return f"{100 * gain['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
