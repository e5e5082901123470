"""Who answers what: which knowledge does fusing keep, which does it lose, and what is new?

As in the paper's figures 7 to 10: questions by which of receiver, sharer and Cache-to-Cache are right, and accuracy
by category. From the predictions of a saved evaluation, or asked live.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvfuse.analysis.answering import ask
from kvfuse.analysis.finding import Finding
from kvfuse.analysis.study import Study
from kvfuse.errors import AnalysisError
from kvfuse.evaluation.predictions import Prediction, read_run
from kvfuse.evaluation.report.figures import (
    KNEW,
    categories_height,
    draw_categories,
    draw_overlap,
    knowledge,
    overlap_height,
    shares,
)
from kvfuse.evaluation.report.verdict import FUSED, RECEIVER, SHARER
from kvfuse.evaluation.scoring.metrics import task_figures
from kvfuse.evaluation.scoring.task_scores import TaskScores, by_task
from kvfuse.methods import make_method
from kvfuse.support.plots import new_panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(study: Study, predictions: str | None = None, task: str | None = None) -> Finding:
    """Sort questions by who has them right.

    Args:
        study: A pair with questions and answers, asked where there are no predictions.
        predictions: The folder of a saved evaluation.
        task: Which of its tasks to look at; by default the first.

    Raises:
        AnalysisError: There is no such task, or one of the methods has not answered.
        EvaluationError: The folder has no predictions, or damaged ones.
    """
    scores = _choose(by_task(read_run(predictions).predictions), task) if predictions else _asked(study)
    found = task_figures(scores)
    if found["overlap"] is None or RECEIVER not in found["overlap"]["methods"]:
        raise AnalysisError(
            f"expected answers of {RECEIVER} and {FUSED} to the same items, got {', '.join(found['methods'])}; ask both"
        )
    methods, regions = found["overlap"]["methods"], found["overlap"]["regions"]
    figures = {
        "task": scores.rows[0].task,
        "overlap": found["overlap"],
        "knowledge": knowledge(methods, regions),
        "methods": {name: found["methods"][name] for name in methods},
        "categories": found["categories"],
    }
    return Finding(figures, reading(figures), lambda: draw(figures))


def _choose(tasks: Mapping[str, TaskScores], task: str | None) -> TaskScores:
    if task is not None and task not in tasks:
        raise AnalysisError(f"expected a task of {', '.join(tasks)}, got {task!r}; choose one of them")
    return tasks[task] if task else next(iter(tasks.values()))


def _asked(study: Study) -> TaskScores:
    """The study's questions, answered by all three."""
    answers = {name: ask(study, make_method(name, study.pair)) for name in (RECEIVER, SHARER, FUSED)}
    return TaskScores(
        [
            Prediction(
                task="questions",
                item=str(place),
                method=name,
                prompt_hash="",
                answer=some.replies[place],
                target=str(one.answer),
                score=float(some.right[place]),
                group=str(some.groups[place]),
                category=one.category,
            )
            for name, some in answers.items()
            for place, one in enumerate(study.questions)
        ]
    )


def reading(figures: dict[str, Any]) -> str:
    """Two sentences: what is kept of each, and what nobody knew."""
    known = {name: one for name, one in figures["knowledge"].items() if sum(one.values())}
    told = [f"what {KNEW[name]} had right, {_share(one)}" for name, one in known.items() if name]
    kept = (
        f"Fused, the receiver still has right: of {'; of '.join(told)}."
        if told
        else "Without fusing, nobody had anything right."
    )
    nobody = known.get("")
    new = (
        f"{_share(nobody)} of the {sum(nobody.values()):,.0f} questions that nobody had right"
        if nobody
        else "nothing, as nothing was left"
    )
    return f"{kept} New is {new}."


def _share(one: Mapping[str, float]) -> str:
    return f"{100 * one['right'] / sum(one.values()):.1f}%"


@styled
def draw(figures: dict[str, Any]) -> "Figure":
    """What is kept and lost, below that accuracy by category where there are several."""
    methods = figures["overlap"]["methods"]
    categories = shares(figures["categories"], methods)
    heights = [
        0.6 + overlap_height(figures["knowledge"]),
        *([0.6 + categories_height(categories)] if categories else []),
    ]
    figure, panels = new_panels(sum(heights) + 0.4, 1, len(heights), height_ratios=heights)
    draw_overlap(panels[0], figures["knowledge"])
    if categories:
        draw_categories(panels[1], categories, "right answers (%), 95% interval")
        panels[1].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    return figure
