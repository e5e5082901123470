"""Figures of saved runs: folders of ``kvfuse eval`` and ``kvfuse train``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from kvfuse.errors import AnalysisError
from kvfuse.evaluation.predictions import CONFIG, PREDICTIONS, read_run
from kvfuse.evaluation.report.verdict import FUSED, RECEIVER, SHARER
from kvfuse.evaluation.scoring.metrics import paired
from kvfuse.evaluation.scoring.statistics import accuracy
from kvfuse.evaluation.scoring.task_scores import TaskScores, by_task

RESULT, LENGTH, PARAMETERS = "result.json", "tokens_in", ".parameters"
NUM_BINS = 4
LOSSES = ("receiver", "fused", "mismatched")


def read_points(folder: Path, against: str, x: float | None, task: str | None) -> list[dict[str, Any]]:
    """Returns the points of a run: one, or one per quarter of the items where they are put in order of their length.

    Args:
        folder: Of an evaluation or a training.
        against: The key that orders the runs; see :func:`kvfuse.analysis.scaling.run`.
        x: Position on the axis; by default read from the run.
        task: See :func:`read_task`.

    Raises:
        AnalysisError: There is no run, or it does not have the key.
    """
    # 1) A folder holds an evaluation, a training, or both.
    config, result = _read_mapping(folder / CONFIG), _read_training(folder)
    scores = read_task(folder, task) if (folder / PREDICTIONS).exists() else None
    if scores is None and result is None:
        raise AnalysisError(
            f"expected a run in {folder}, got neither {PREDICTIONS} nor {RESULT}; name an evaluation's or a training's "
            "folder"
        )
    # 2) Several points from one evaluation, or one point per run.
    if against == LENGTH and x is None:
        return _points_by_length(scores, folder)
    return [
        {
            "run": folder.name,
            "x": _number({**(result or {}), **config}, against, folder) if x is None else float(x),
            **({} if scores is None else _accuracies(scores, np.ones(len(scores.items), dtype=bool))),
            **(
                {"bits_per_character": {name: result[name] for name in LOSSES if result[name] is not None}}
                if result
                else {}
            ),
        }
    ]


def read_task(folder: str | Path, task: str | None) -> TaskScores:
    """Returns the scores of a saved evaluation's task, by default its first. Raises AnalysisError: an unknown task."""
    tasks = by_task(read_run(folder).predictions)
    if task is not None and task not in tasks:
        raise AnalysisError(f"expected a task of {', '.join(tasks)} in {folder}, got {task!r}; choose one of them")
    return tasks[task] if task else next(iter(tasks.values()))


def _accuracies(scores: TaskScores, chosen: np.ndarray) -> dict[str, Any]:
    """Accuracy of each method and the gain of fusing, on the ``chosen`` items, ``(items,)`` bool."""
    methods = {}
    for name in (RECEIVER, SHARER, FUSED):
        if name in scores.scores and (answered := scores.answered(name) & chosen).any():
            share, interval = accuracy(scores.mean(name)[answered], scores.groups[answered])
            methods[name] = {"accuracy": share, "interval": interval}
    if RECEIVER not in methods or FUSED not in methods:
        return {"methods": methods}
    # the gain is paired: only items that both have answered
    both = scores.answered(RECEIVER, FUSED) & chosen
    gains = (scores.mean(FUSED) - scores.mean(RECEIVER))[both]
    return {"methods": methods, "gain": paired(gains, scores.groups[both])}


def _points_by_length(scores: TaskScores | None, folder: Path) -> list[dict[str, Any]]:
    """A point per quarter of the items, by the length that the receiver reads, at their mean length."""
    lengths_in = {row.item: row.tokens_in for row in scores.rows if row.method == RECEIVER} if scores else {}
    if scores is None or any(lengths_in.get(item) is None for item in scores.items):
        raise AnalysisError(
            f"expected the receiver's {LENGTH} of every item in {folder}, got items without; evaluate it again"
        )
    lengths = np.array([lengths_in[item] for item in scores.items], dtype=float)
    # sort, then split evenly
    quarters = np.array_split(np.argsort(lengths, kind="stable"), min(NUM_BINS, len(lengths)))
    items = np.arange(len(lengths))
    return [
        {"run": folder.name, "x": float(lengths[quarter].mean()), **_accuracies(scores, np.isin(items, quarter))}
        for quarter in quarters
    ]


def _read_training(folder: Path) -> dict[str, Any] | None:
    """The result of a training in this folder, or next to the fuser that was evaluated."""
    # a recipe names one fuser or a list of them
    fusers = np.ravel(_read_mapping(folder / CONFIG).get("fuser") or []).tolist()
    folders = [folder, *(Path(fuser).parent for fuser in fusers[:1] if isinstance(fuser, str))]
    return next((_read_mapping(path / RESULT) for path in folders if (path / RESULT).is_file()), None)


def _number(content: dict[str, Any], key: str, folder: Path) -> float:
    """The number at a dotted key of a run's configuration and result, or a model's number of parameters."""
    if key.endswith(PARAMETERS):
        role = key.removesuffix(PARAMETERS)
        name = content.get(role)
        if not isinstance(name, str):
            name = content.get("models", {}).get(role, {}).get("name")
        if name:
            return _count_parameters(name)
    # follow the dots
    value: Any = content
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise AnalysisError(
            f"expected a number at {key!r} in {folder / CONFIG} or {RESULT}, got {value!r}; choose another, or give at"
        )
    return float(value)


def _count_parameters(name: str) -> float:
    """Number of a model's parameters, from its configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):  # without allocating weights
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    return float(model.num_parameters())


def _read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file; empty where there is none."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text) or {}
