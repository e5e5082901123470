"""A run's predictions and timings -> every figure of its report, as plain numbers."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from kvfuse.evaluation.predictions import Run, Timing
from kvfuse.evaluation.report.verdict import FUSED, MISMATCHED, RECEIVER, SHARER, verdict
from kvfuse.evaluation.scoring import statistics
from kvfuse.evaluation.scoring.audit import audit
from kvfuse.evaluation.scoring.statistics import Interval
from kvfuse.evaluation.scoring.task_scores import RIGHT, TaskScores, by_task
from kvfuse.stages.phases import PHASES

Figures = dict[str, Any]


def metrics(run: Run) -> Figures:
    """Returns all figures of a run's report, shares and seconds as plain numbers; ``metrics.json`` holds them."""
    tasks = by_task(run.predictions)
    return {
        **({"note": run.note} if run.note else {}),
        "tasks": {name: task_figures(task) for name, task in tasks.items()},
        "average": average(list(tasks.values())) if len(tasks) > 1 else None,
        "latency": latency(run.timings),
    }


def task_figures(task: TaskScores) -> Figures:
    """Returns the figures of one task."""
    methods = {name: _method(task, name) for name in task.scores if task.answered(name).any()}
    figures: Figures = {
        "items": len(task.items),
        "groups": len(set(task.groups)),
        "graded": any(row.score not in (0, 1) for row in task.rows),
        "methods": methods,
        "pairs": _pairs(task),
        "content": _content(task),
        "audit": audit(task, methods),
        "overlap": _overlap(task),
        "categories": _categories(task),
    }
    return {"verdict": verdict(figures), **figures}


def paired(difference: np.ndarray, groups: np.ndarray) -> Figures:
    """Returns a paired difference with its interval.

    Args:
        difference: ``(items,)``, of scores.
        groups: ``(items,)``, the topic of each item.
    """
    return _with_interval("difference", statistics.bootstrap_mean(difference, groups))


def average(tasks: Sequence[TaskScores]) -> Figures:
    """Returns the mean over tasks and its gain over the receiver's, for each method that answered in all tasks."""
    figures: Figures = {}
    with_receiver = all(RECEIVER in task.scores for task in tasks)
    # a mean over other tasks would be another figure, so a method needs answers in all of them
    for name in tasks[0].scores:
        if not all(name in task.scores and task.answered(name, *_present(task, RECEIVER)).any() for task in tasks):
            continue
        figures[name] = _with_interval(
            "accuracy", statistics.bootstrap_average([_of(task, task.mean(name), name) for task in tasks])
        )
        if with_receiver and name != RECEIVER:
            gains = [_of(task, task.gain(name, over=RECEIVER), name, RECEIVER) for task in tasks]
            figures[name]["gain"] = _with_interval("difference", statistics.bootstrap_average(gains))
    return figures


def latency(timings: Sequence[Timing]) -> Figures:
    """Returns seconds by method (median, mean, 95th percentile, mean of each phase) and mean numbers of tokens."""
    by_method: dict[str, list[Timing]] = {}
    for row in timings:
        by_method.setdefault(row.method, []).append(row)
    return {name: _latency(rows) for name, rows in by_method.items()}


def all_phases(latency: Figures) -> list[str]:
    """Returns the phases of all methods, in order; see :func:`latency`."""
    return _in_order(method["phases"] for method in latency.values())


def _latency(rows: Sequence[Timing]) -> Figures:
    seconds, phases = [row.seconds for row in rows], _in_order(row.phases for row in rows)
    return {
        "questions": len(rows),
        "median": float(np.median(seconds)),
        "p95": float(np.percentile(seconds, 95)),
        "mean": fmean(seconds),
        "phases": {phase: fmean(row.phases.get(phase, 0.0) for row in rows) for phase in phases},
        "tokens_in": _mean_known(row.tokens_in for row in rows),
        "tokens": _mean_known(row.tokens for row in rows),
    }


def _in_order(phases_of_rows: Iterable[Iterable[str]]) -> list[str]:
    """Returns every phase once, the known ones in the order in which a question passes them."""
    # plugins may measure phases of their own, which come last
    found = dict.fromkeys(phase for phases in phases_of_rows for phase in phases)
    return [*(phase for phase in PHASES if phase in found), *(phase for phase in found if phase not in PHASES)]


def _method(task: TaskScores, name: str) -> Figures:
    answered, rows = task.answered(name), [row for row in task.rows if row.method == name]
    by_seed = zip(task.seeds[name], task.scores[name][:, answered], strict=True)
    kept = {other: _kept(task, name, of=other) for other in _present(task, RECEIVER, SHARER) if other != name}
    return {
        **_with_interval("accuracy", statistics.accuracy(*_of(task, task.mean(name), name))),
        "items": int(answered.sum()),
        "seeds": {str(seed): float(scores.mean()) for seed, scores in by_seed if seed is not None},
        "failed": sum(row.failed is not None for row in rows),
        "unread": sum(row.failed is None and row.extracted is None for row in rows),
        "tokens": _mean_known(row.tokens for row in rows),
        "kept": {other: figures for other, figures in kept.items() if figures is not None},
    }


def _kept(task: TaskScores, name: str, *, of: str) -> Figures | None:
    """Returns the share of the items that ``of`` has right which ``name`` has right, too."""
    # an item counts as known where most seeds have it right
    known = task.answered(name, of) & (task.mean(of) >= RIGHT)
    if not known.any():
        return None
    right = (task.scores[name][:, known] >= RIGHT).mean(axis=0)
    return {**_with_interval("share", statistics.accuracy(right, task.groups[known])), "items": int(known.sum())}


def _pairs(task: TaskScores) -> list[Figures]:
    """Returns all pairs of methods, each the later one in the file minus the earlier one.

    The p-values are adjusted over all pairs of the task.
    """
    names = [(name, other) for other, name in combinations(task.scores, 2) if task.answered(name, other).any()]
    pairs = [_pair(task, name, other) for name, other in names]
    adjusted = statistics.holm([pair["p"] for pair in pairs])
    return [{**pair, "p_holm": p_value} for pair, p_value in zip(pairs, adjusted, strict=True)]


def _pair(task: TaskScores, name: str, other: str) -> Figures:
    """Helped and hurt are averages over seeds; in the test, an item counts once, for the side of most of its seeds."""
    answered = task.answered(name, other)
    right, other_right = (scores[:, answered] >= RIGHT for scores in task.pair_seeds(name, other))  # (seeds, items)
    balance = right.mean(axis=0) - other_right.mean(axis=0)  # (items,), above 0 where more seeds have it right
    return {
        "method": name,
        "against": other,
        "items": int(answered.sum()),
        **paired(*_of(task, task.gain(name, over=other), name, other)),
        "helped": float((right & ~other_right).sum(axis=1).mean()),
        "hurt": float((~right & other_right).sum(axis=1).mean()),
        "p": statistics.mcnemar(int((balance > 0).sum()), int((balance < 0).sum())),
    }


def _content(task: TaskScores) -> Figures | None:
    """Returns the part of cache-to-cache that needs the sharer to have read this question.

    It is cache-to-cache minus the mismatched control; its share of the gain is given where there is a gain.
    """
    methods = _present(task, FUSED, MISMATCHED, RECEIVER)
    if len(methods) < 3 or not (answered := task.answered(*methods)).any():
        return None
    content_by_item, groups = _of(task, task.gain(FUSED, over=MISMATCHED), *methods)
    gain_by_item, _ = _of(task, task.gain(FUSED, over=RECEIVER), *methods)
    gain, share, interval = paired(gain_by_item, groups), None, None
    # a share of a gain that may be zero has no meaningful interval
    if gain["interval"][0] > 0:
        share, interval = statistics.bootstrap_ratio(part=content_by_item, whole=gain_by_item, groups=groups)
    content = {"gain": gain, "share_of_gain": share, "share_interval": interval, "items": int(answered.sum())}
    return {**paired(content_by_item, groups), **content}


def _overlap(task: TaskScores) -> Figures | None:
    """Returns the number of items that exactly these methods have right (``receiver+sharer``), averaged over seeds."""
    methods = _present(task, RECEIVER, SHARER, FUSED)
    if FUSED not in methods or len(methods) < 2 or not (answered := task.answered(*methods)).any():
        return None
    # methods without a fuser are repeated for each seed of those with one
    shape = len(task.scores[FUSED]), int(answered.sum())
    right = {name: np.resize(task.scores[name][:, answered] >= RIGHT, shape) for name in methods}  # (seeds, items)
    # every subset of the methods is a region, and every item of a seed is in exactly one
    regions = [names for size in range(len(methods) + 1) for names in combinations(methods, size)]
    matches = {names: np.all([right[name] == (name in names) for name in methods], axis=0) for names in regions}
    counts = {"+".join(names): float(match.sum(axis=1).mean()) for names, match in matches.items()}
    return {"methods": methods, "regions": counts}


def _categories(task: TaskScores) -> Figures:
    names = sorted(set(task.categories))
    return {str(name): _category(task, task.categories == name) for name in names} if len(names) > 1 else {}


def _category(task: TaskScores, in_category: np.ndarray) -> Figures:
    methods: Figures = {}
    for name in task.scores:
        if (chosen := in_category & task.answered(name)).any():
            methods[name] = _with_interval(
                "accuracy", statistics.accuracy(task.mean(name)[chosen], task.groups[chosen])
            )
    return {"items": int(in_category.sum()), "methods": methods}


def _of(task: TaskScores, values: np.ndarray, *methods: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values and groups of the items that all of these methods have answered."""
    answered = task.answered(*methods)
    return values[answered], task.groups[answered]


def _with_interval(name: str, figure: tuple[float, Interval]) -> Figures:
    return {name: figure[0], "interval": figure[1]}


def _mean_known(counts: Iterable[int | None]) -> float | None:
    known = [count for count in counts if count is not None]
    return fmean(known) if known else None


def _present(task: TaskScores, *methods: str) -> list[str]:
    return [name for name in methods if name in task.scores]
