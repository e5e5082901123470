"""A run's predictions and timings -> every figure of its report, as plain numbers."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from kvfuse.evaluation.predictions import Run, Timing
from kvfuse.evaluation.report.verdict import FUSED, MISMATCHED, RECEIVER, SHARER, verdict
from kvfuse.evaluation.scoring.statistics import (
    accuracy,
    bootstrap_average,
    bootstrap_mean,
    bootstrap_ratio,
    holm,
    mcnemar,
)
from kvfuse.evaluation.scoring.task_scores import TaskScores, by_task
from kvfuse.stages.phases import PHASES

RIGHT = 0.5
"""An item counts as right from this score on, where figures need a yes or no: helped, hurt, kept, the circles."""

Figures = dict[str, Any]


def metrics(run: Run) -> Figures:
    """Everything that a run's report shows, shares and seconds as plain numbers; ``metrics.json`` is this."""
    tasks = by_task(run.predictions)
    return {
        **({"note": run.note} if run.note else {}),
        "tasks": {name: task_figures(task) for name, task in tasks.items()},
        "average": average(list(tasks.values())) if len(tasks) > 1 else None,
        "latency": latency(run.timings),
    }


def task_figures(task: TaskScores) -> Figures:
    """The figures of one task."""
    figures: Figures = {
        "items": len(task.items),
        "groups": len(set(task.groups)),
        "graded": any(row.score not in (0, 1) for row in task.rows),
        "methods": {name: _method(task, name) for name in task.scores if task.answered(name).any()},
        "pairs": _pairs(task),
        "content": _content(task),
        "overlap": _overlap(task),
        "categories": _categories(task),
    }
    return {"verdict": verdict(figures), **figures}


def paired(difference: np.ndarray, groups: np.ndarray) -> Figures:
    """A paired difference with its interval.

    Args:
        difference: ``(items,)``, of scores.
        groups: What each item is about.
    """
    mean, interval = bootstrap_mean(difference, groups)
    return {"difference": mean, "interval": interval}


def average(tasks: Sequence[TaskScores]) -> Figures:
    """By method, the mean over tasks and its gain over the receiver's, for methods that have answered in all of them."""
    out = {}
    for name in tasks[0].scores:
        if all(name in task.scores and task.answered(name, *_present(task, RECEIVER)).any() for task in tasks):
            mean, interval = bootstrap_average([_scores(task, name) for task in tasks])
            out[name] = {"accuracy": mean, "interval": interval}
            if name != RECEIVER and all(RECEIVER in task.scores for task in tasks):
                gain, interval = bootstrap_average([_gains(task, name) for task in tasks])
                out[name]["gain"] = {"difference": gain, "interval": interval}
    return out


def all_phases(latency: Figures) -> list[str]:
    """The phases of all methods; see :func:`latency`."""
    return _in_order(one["phases"] for one in latency.values())


def latency(timings: Sequence[Timing]) -> Figures:
    """By method: median, mean and 95th percentile of the seconds, mean seconds of each phase, mean tokens."""
    by_method: dict[str, list[Timing]] = {}
    for row in timings:
        by_method.setdefault(row.method, []).append(row)
    return {name: _latency(rows) for name, rows in by_method.items()}


def _latency(rows: Sequence[Timing]) -> Figures:
    seconds = [row.seconds for row in rows]
    return {
        "questions": len(rows),
        "median": float(np.median(seconds)),
        "p95": float(np.percentile(seconds, 95)),
        "mean": fmean(seconds),
        "phases": {
            phase: fmean(row.phases.get(phase, 0.0) for row in rows) for phase in _in_order(row.phases for row in rows)
        },
        "tokens_in": _mean_known(row.tokens_in for row in rows),
        "tokens": _mean_known(row.tokens for row in rows),
    }


def _in_order(some: Iterable[Iterable[str]]) -> list[str]:
    """Every phase once, those that are known in the order of a question's way."""
    found = dict.fromkeys(phase for phases in some for phase in phases)
    return [*(phase for phase in PHASES if phase in found), *(phase for phase in found if phase not in PHASES)]


def _method(task: TaskScores, name: str) -> Figures:
    done, rows = task.answered(name), [row for row in task.rows if row.method == name]
    mean, interval = accuracy(*_scores(task, name))
    seeds = [float(one.mean()) for one in task.scores[name][:, done]]
    return {
        "accuracy": mean,
        "interval": interval,
        "items": int(done.sum()),
        "seeds": dict(zip(map(str, task.seeds[name]), seeds, strict=True)) if task.seeds[name] != [None] else {},
        "failed": sum(row.failed is not None for row in rows),
        "unread": sum(row.failed is None and row.extracted is None for row in rows),
        "tokens": _mean_known(row.tokens for row in rows),
        "kept": {
            other: kept
            for other in _present(task, RECEIVER, SHARER)
            if other != name and (kept := _kept(task, name, other))
        },
    }


def _kept(task: TaskScores, name: str, other: str) -> Figures | None:
    """Of the items that another method has right, the share that this one has right too."""
    knew = task.answered(name, other) & (task.mean(other) >= RIGHT)
    if not knew.any():
        return None
    share, interval = accuracy((task.scores[name][:, knew] >= RIGHT).mean(axis=0), task.groups[knew])
    return {"share": share, "interval": interval, "items": int(knew.sum())}


def _pairs(task: TaskScores) -> list[Figures]:
    """Every pair of methods, the later of the file minus the earlier; p-values adjusted over all pairs of the task."""
    pairs = [
        _pair(task, name, other) for other, name in combinations(task.scores, 2) if task.answered(name, other).any()
    ]
    for pair, adjusted in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_holm"] = adjusted
    return pairs


def _pair(task: TaskScores, name: str, other: str) -> Figures:
    """With several seeds, helped and hurt are averages over them, and an item is one in the test, for the side of most of its seeds."""
    both = task.answered(name, other)
    mine, theirs = (scores[:, both] >= RIGHT for scores in task.stacked_layers(name, other))
    leaning = mine.mean(axis=0) - theirs.mean(axis=0)
    return {
        "method": name,
        "against": other,
        "items": int(both.sum()),
        **paired((task.mean(name) - task.mean(other))[both], task.groups[both]),
        "helped": float((mine & ~theirs).sum(axis=1).mean()),
        "hurt": float((~mine & theirs).sum(axis=1).mean()),
        "p": mcnemar(int((leaning > 0).sum()), int((leaning < 0).sum())),
    }


def _content(task: TaskScores) -> Figures | None:
    """What of cache-to-cache needs the sharer to have read this question: its score minus the mismatched control's."""
    methods = _present(task, FUSED, MISMATCHED, RECEIVER)
    if len(methods) < 3 or not (done := task.answered(*methods)).any():
        return None
    fused, mismatched, receiver = (task.mean(name)[done] for name in methods)
    groups = task.groups[done]
    content, gain = paired(fused - mismatched, groups), paired(fused - receiver, groups)
    share, interval = (
        bootstrap_ratio(fused - mismatched, fused - receiver, groups) if gain["interval"][0] > 0 else (None, None)
    )
    return {**content, "gain": gain, "share_of_gain": share, "share_interval": interval, "items": int(done.sum())}


def _overlap(task: TaskScores) -> Figures | None:
    """Items by who has them right, e.g. ``receiver+sharer``: neither more nor fewer; averages over seeds."""
    methods = _present(task, RECEIVER, SHARER, FUSED)
    if FUSED not in methods or len(methods) < 2 or not (done := task.answered(*methods)).any():
        return None
    seeds = len(task.scores[FUSED])
    right = {name: np.resize(task.scores[name][:, done] >= RIGHT, (seeds, done.sum())) for name in methods}
    regions = [some for size in range(len(methods) + 1) for some in combinations(methods, size)]
    counts = {"+".join(some): np.all([right[name] == (name in some) for name in methods], axis=0) for some in regions}
    return {
        "methods": methods,
        "regions": {region: float(count.sum(axis=1).mean()) for region, count in counts.items()},
    }


def _categories(task: TaskScores) -> Figures:
    category = np.array([str(row.category) for row in task.items.values()])
    if len(set(category)) < 2:
        return {}
    return {str(name): _category(task, category == name) for name in sorted(set(category))}


def _category(task: TaskScores, these: np.ndarray) -> Figures:
    out = {}
    for name in task.scores:
        if (done := these & task.answered(name)).any():
            mean, interval = accuracy(task.mean(name)[done], task.groups[done])
            out[name] = {"accuracy": mean, "interval": interval}
    return {"items": int(these.sum()), "methods": out}


def _scores(task: TaskScores, name: str) -> tuple[np.ndarray, np.ndarray]:
    done = task.answered(name)
    return task.mean(name)[done], task.groups[done]


def _gains(task: TaskScores, name: str) -> tuple[np.ndarray, np.ndarray]:
    both = task.answered(name, RECEIVER)
    return (task.mean(name) - task.mean(RECEIVER))[both], task.groups[both]


def _mean_known(counts: Iterable[int | None]) -> float | None:
    known = [count for count in counts if count is not None]
    return fmean(known) if known else None


def _present(task: TaskScores, *methods: str) -> list[str]:
    return [name for name in methods if name in task.scores]
