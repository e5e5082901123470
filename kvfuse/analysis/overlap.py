"""Who answers what: which knowledge does fusing keep, which does it lose, and what is new?

As in the paper's figures 7 to 10: questions by which of receiver, sharer and Cache-to-Cache are right, and accuracy by
category, from the predictions of a saved evaluation or from the study's own questions.
"""

from collections.abc import Mapping
from typing import Any

from kvfuse.analysis.answering import ask
from kvfuse.analysis.finding import Finding
from kvfuse.analysis.saved_runs import read_task
from kvfuse.analysis.study import Study
from kvfuse.errors import AnalysisError
from kvfuse.evaluation.predictions import Prediction
from kvfuse.evaluation.report.figures import categories_height, draw_categories, draw_venn, shares
from kvfuse.evaluation.report.verdict import FUSED, RECEIVER, SHARER
from kvfuse.evaluation.scoring.metrics import task_figures
from kvfuse.evaluation.scoring.task_scores import TaskScores
from kvfuse.methods import make_method
from kvfuse.support import plots

KNEW = {RECEIVER: "only the receiver", SHARER: "only the sharer", f"{RECEIVER}+{SHARER}": "both", "": "neither"}
"""The models that are right without fusing, in words."""


def run(study: Study, predictions: str | None = None, task: str | None = None) -> Finding:
    """Sort questions by who answers them right.

    Args:
        study: A pair with questions and answers, asked where there are no predictions.
        predictions: Folder of a saved evaluation.
        task: Its task to look at; by default the first.

    Raises:
        AnalysisError: There is no such task, or a method has not answered.
        EvaluationError: The folder has no predictions, or damaged ones.
    """
    # 1) Scores of all three methods on the same items.
    scores = read_task(predictions, task) if predictions else _ask(study)
    # 2) Regions of the Venn diagram, with the report's own code.
    found = task_figures(scores)
    overlap = found["overlap"]
    if overlap is None or RECEIVER not in overlap["methods"]:
        raise AnalysisError(
            f"expected answers of {RECEIVER} and {FUSED} to the same items, got {', '.join(found['methods'])}; ask both"
        )
    # 3) Split them by who was right without fusing.
    figures = {
        "task": scores.rows[0].task,
        "overlap": overlap,
        "knowledge": knowledge(overlap["methods"], overlap["regions"]),
        "methods": {name: found["methods"][name] for name in overlap["methods"]},
        "categories": found["categories"],
    }
    return Finding(figures, reading(figures), lambda: draw(figures))


def knowledge(methods: list[str], regions: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Number of questions that are right and wrong when fused, by who is right without (keys of :data:`KNEW`)."""
    # without answers of the sharer there are fewer groups
    knowers = [name for name in KNEW if SHARER in methods or SHARER not in name]
    return {name: {"right": regions[f"{name}+{FUSED}" if name else FUSED], "wrong": regions[name]} for name in knowers}


def _ask(study: Study) -> TaskScores:
    """The study's questions, answered by all three methods."""
    answers = {name: ask(study, make_method(name, study.pair)) for name in (RECEIVER, SHARER, FUSED)}
    return TaskScores(
        [
            Prediction(
                task="questions",
                item=str(index),
                method=name,
                prompt_hash="",
                answer=answered.replies[index],
                target=str(question.answer),
                score=float(answered.right[index]),
                group=str(answered.groups[index]),
                category=question.category,
            )
            for name, answered in answers.items()
            for index, question in enumerate(study.questions)
        ]
    )


def reading(figures: dict[str, Any]) -> str:
    """Two sentences: the share kept of each model's knowledge, and the share of new answers."""
    known = {name: counts for name, counts in figures["knowledge"].items() if sum(counts.values())}
    kept = [f"what {KNEW[name]} had right, {_share(counts)}" for name, counts in known.items() if name]
    first = (
        f"Fused, the receiver still has right: of {'; of '.join(kept)}."
        if kept
        else "Without fusing, no answer was right."
    )
    # what no model knew, and is right when fused
    unknown = known.get("")
    if unknown is None:
        return f"{first} New is nothing, as nothing was left."
    return f"{first} New is {_share(unknown)} of the {sum(unknown.values()):,.0f} questions that no model had right."


def _share(counts: Mapping[str, float]) -> str:
    return f"{100 * counts['right'] / sum(counts.values()):.1f}%"


@plots.styled
def draw(figures: dict[str, Any]) -> plots.Figure:
    """Circles; below them what is kept and lost; below that accuracy by category, where there are several."""
    methods = figures["overlap"]["methods"]
    categories = shares(figures["categories"], methods)
    heights = [3.3, 0.6 + 0.4 * len(figures["knowledge"])]
    if categories:
        heights.append(0.6 + categories_height(categories))
    figure, panels = plots.new_panels(sum(heights) + 0.4, 1, len(heights), height_ratios=heights)
    draw_venn(panels[0], methods, figures["overlap"]["regions"])
    _draw_knowledge(panels[1], figures["knowledge"])
    if categories:
        draw_categories(panels[2], categories, "right answers (%), 95% interval")
        plots.legend_on_top(panels[2], 3)
    return figure


def _draw_knowledge(axes: plots.Axes, known: Mapping[str, Mapping[str, float]]) -> None:
    """A bar per group of models, and the share of it that is right when fused."""
    parts = {f"{outcome} when fused": [counts[outcome] for counts in known.values()] for outcome in ("right", "wrong")}
    plots.stack_bars(axes, parts, 0.6, (plots.COLOURS[2], plots.COLOURS[5]))
    # the kept share behind each bar
    totals = [sum(counts.values()) for counts in known.values()]
    for line, (counts, total) in enumerate(zip(known.values(), totals, strict=True)):
        axes.text(total, line, f" {_share(counts)}" if total else " none", va="center")
    plots.name_lines(axes, [KNEW[name] for name in known])
    axes.set_xlim(0, 1.2 * max(*totals, 1))
    axes.set_xlabel("questions, by who has them right without fusing")
    plots.legend_on_top(axes, 2)
