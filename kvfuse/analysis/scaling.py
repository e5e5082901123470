"""How does the gain grow: with the size of the models, the length of prompts, the tokens of training?

As in the paper's figure 6 and table 12, from saved runs: folders of ``kvfuse eval`` and ``kvfuse train``, each at a figure of its own.
Without any, a new fuser of the pair's own configuration is trained for some steps, and asked on the way.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.study import Study
from kvfuse.analysis.training_curve import train_and_ask
from kvfuse.errors import AnalysisError
from kvfuse.evaluation.predictions import CONFIG, PREDICTIONS, read_run
from kvfuse.evaluation.report.verdict import FUSED, MISMATCHED, RECEIVER, SHARER, points
from kvfuse.evaluation.scoring.metrics import paired
from kvfuse.evaluation.scoring.statistics import accuracy
from kvfuse.evaluation.scoring.task_scores import TaskScores, by_task
from kvfuse.support.plots import COLOURS, INK, MARKERS, legend_above, new_panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT, LENGTH, PARAMETERS = "result.json", "tokens_in", ".parameters"
BINS = 4
LARGE = 10_000
"""From here on the axis counts in thousands (k), millions (M) and billions (G)."""
GAIN = "cache-to-cache minus receiver"
LOOKS = dict(zip((RECEIVER, SHARER, FUSED, MISMATCHED, GAIN), zip(COLOURS, MARKERS, strict=True), strict=False))
LOSSES = ("receiver", "fused", "mismatched")
YLABELS = {
    "methods": "right answers (%), 95% interval",
    "gain": "gain over the receiver (points), 95% interval",
    "bits_per_character": "held-out bits per character",
}


def run(
    study: Study,
    runs: Sequence[str] = (),
    against: str = "training.tokens",
    at: Sequence[float] = (),
    task: str | None = None,
) -> Finding:
    """Put runs in the order of a figure.

    Args:
        study: Without runs: a pair with questions, and others to train on.
        runs: Folders of evaluations or of trainings.
        against: What they differ in: a key of a run's ``config.yaml`` or of the ``result.json`` of its training, with dots; or
            ``receiver.parameters``, ``sharer.parameters``; or ``tokens_in``, which cuts each evaluation into quarters by the length
            of what the receiver reads.
        at: In its place a number for each run, ``against`` being what to call it.
        task: Of the evaluations; by default the first.

    Raises:
        AnalysisError: A run has no such figure or task, or there is nothing to train on.
        EvaluationError: A folder's predictions are damaged.
    """
    if not runs:
        return train_and_ask(study)
    if at and len(at) != len(runs):
        raise AnalysisError(f"expected a number for each of {len(runs)} runs in at, got {len(at)}; give as many")
    found = [
        point
        for place, one in enumerate(runs)
        for point in _points(Path(one), against, at[place] if at else None, task)
    ]
    figures = {"against": against, "points": sorted(found, key=lambda point: point["x"])}
    return Finding(figures, reading(figures), lambda: draw(figures))


def _points(folder: Path, against: str, x: float | None, task: str | None) -> list[dict[str, Any]]:
    """What a folder tells: one point, or one for each length."""
    config, result = _mapping(folder / CONFIG), _training_of(folder)
    scores = _scores(folder, task) if (folder / PREDICTIONS).exists() else None
    if scores is None and result is None:
        raise AnalysisError(
            f"expected a run in {folder}, got neither {PREDICTIONS} nor {RESULT}; name the folder of an evaluation or training"
        )
    losses = {"bits_per_character": {name: result[name] for name in LOSSES}} if result else {}
    if against == LENGTH and x is None:
        return _by_length(scores, folder)
    x = _figure({**(result or {}), **config}, against, folder) if x is None else float(x)
    answered = {} if scores is None else _answered(scores, np.ones(len(scores.items), dtype=bool))
    return [{"run": folder.name, "x": x, **answered, **losses}]


def _scores(folder: Path, task: str | None) -> TaskScores:
    tasks = by_task(read_run(folder).predictions)
    if task is not None and task not in tasks:
        raise AnalysisError(f"expected a task of {', '.join(tasks)} in {folder}, got {task!r}; choose one of them")
    return tasks[task] if task else next(iter(tasks.values()))


def _answered(scores: TaskScores, which: np.ndarray) -> dict[str, Any]:
    """Accuracy of each method, and what fusing gains, on some of the items."""
    names = [
        name for name in (RECEIVER, SHARER, FUSED) if name in scores.scores and (scores.answered(name) & which).any()
    ]
    methods = {}
    for name in names:
        done = scores.answered(name) & which
        share, interval = accuracy(scores.mean(name)[done], scores.groups[done])
        methods[name] = {"accuracy": share, "interval": interval}
    if not {RECEIVER, FUSED} <= set(names):
        return {"methods": methods}
    both = scores.answered(RECEIVER, FUSED) & which
    return {"methods": methods, "gain": paired((scores.mean(FUSED) - scores.mean(RECEIVER))[both], scores.groups[both])}


def _by_length(scores: TaskScores | None, folder: Path) -> list[dict[str, Any]]:
    """A point for each quarter of the items, from the shortest to the longest that the receiver reads, at their mean length."""
    read = {row.item: row.tokens_in for row in scores.rows if row.method == RECEIVER} if scores else {}
    if scores is None or any(read.get(item) is None for item in scores.items):
        raise AnalysisError(
            f"expected the receiver's {LENGTH} of every item in {folder}, got items without; evaluate it again"
        )
    lengths = np.array([read[item] for item in scores.items], dtype=float)
    quarters = np.array_split(np.argsort(lengths, kind="stable"), min(BINS, len(lengths)))
    items = np.arange(len(lengths))
    return [
        {"run": folder.name, "x": float(lengths[places].mean()), **_answered(scores, np.isin(items, places))}
        for places in quarters
    ]


def _training_of(folder: Path) -> dict[str, Any] | None:
    """What a training has written into this folder, or beside the fuser that was evaluated."""
    fusers = np.ravel(_mapping(folder / CONFIG).get("fuser") or []).tolist()
    beside = [Path(fuser).parent for fuser in fusers[:1] if isinstance(fuser, str)]
    found = next((place / RESULT for place in (folder, *beside) if (place / RESULT).is_file()), None)
    return None if found is None else _mapping(found)


def _figure(told: dict[str, Any], against: str, folder: Path) -> float:
    """A number out of what a run tells of itself."""
    if against.endswith(PARAMETERS):
        role = against.removesuffix(PARAMETERS)
        name = told.get(role) if isinstance(told.get(role), str) else told.get("models", {}).get(role, {}).get("name")
        if name:
            return _parameters(name)
    value: Any = told
    for key in against.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise AnalysisError(
            f"expected a number at {against!r} in {folder / CONFIG} or {RESULT}, got {value!r}; choose another, or give at"
        )
    return float(value)


def _parameters(name: str) -> float:
    """Of a model, from its configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    return float(model.num_parameters())


def _mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text) or {}


def reading(figures: dict[str, Any]) -> str:
    """Two sentences: both ends of the axis, then where it is best."""
    found = figures["points"]
    gains = [(one["gain"]["difference"], one["x"], _points_of(one["gain"])) for one in found if "gain" in one]
    losses = [(one["bits_per_character"], one["x"]) for one in found if "bits_per_character" in one]
    said = gains or [
        (1 - bits["fused"] / bits["receiver"], x, f"{bits['fused']:.3f} bits per character") for bits, x in losses
    ]
    if not said:
        return f"No run has answers of both {RECEIVER} and {FUSED}. There is no gain to compare."
    (_, low, first), (_, high, last), (_, best, _) = said[0], said[-1], max(said)
    what = "the gain over the receiver" if gains else "what held-out responses take"
    return f"From {figures['against']} {low:,.0f} to {high:,.0f}, {what} goes from {first} to {last}. The gain is largest at {best:,.0f}."


def _points_of(gain: dict[str, Any]) -> str:
    return points(gain["difference"], gain["interval"], signed=True) + " points"


@styled
def draw(figures: dict[str, Any]) -> "Figure":
    """Right answers and what is gained, or bits per character, whichever the runs tell."""
    from matplotlib.ticker import EngFormatter

    found = figures["points"]
    kinds = [kind for kind in ("methods", "gain", "bits_per_character") if any(kind in one for one in found)]
    figure, panels = new_panels(4.2, len(kinds))
    shown: dict[str, Any] = {}
    for axes, kind in zip(panels, kinds, strict=True):
        lines = _lines([one for one in found if kind in one], kind)
        for name, (xs, middle, low, high) in lines.items():
            colour, marker = LOOKS[name]
            around = [np.subtract(middle, low), np.subtract(high, middle)]
            drawn = axes.errorbar(
                xs, middle, around, fmt=f"-{marker}", color=colour, markersize=6, elinewidth=1, capsize=2
            )
            shown.setdefault(name, drawn).set_label(name)
        if max(one["x"] for one in found) >= LARGE:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set(xlabel=figures["against"], ylabel=YLABELS[kind])
        axes.margins(x=0.08)
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    legend_above(figure, list(shown.values()))
    return figure


def _lines(
    points: list[dict[str, Any]], kind: str
) -> dict[str, tuple[list[float], list[float], list[float], list[float]]]:
    """By name: places, figures and both ends of their intervals, as they are drawn."""
    lines: dict[str, tuple[list[float], list[float], list[float], list[float]]] = {}
    for point in points:
        for name, middle, (low, high) in _drawn(point, kind):
            for values, value in zip(
                lines.setdefault(name, ([], [], [], [])), (point["x"], middle, low, high), strict=True
            ):
                values.append(value)
    return lines


def _drawn(point: dict[str, Any], kind: str) -> list[tuple[str, float, tuple[float, float]]]:
    if kind == "bits_per_character":
        return [(FUSED if name == "fused" else name, bits, (bits, bits)) for name, bits in point[kind].items()]
    some = {GAIN: {**point["gain"], "accuracy": point["gain"]["difference"]}} if kind == "gain" else point[kind]
    return [
        (name, 100 * one["accuracy"], (100 * one["interval"][0], 100 * one["interval"][1]))
        for name, one in some.items()
    ]
