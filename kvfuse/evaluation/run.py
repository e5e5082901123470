"""``kvfuse eval``: methods against each other on the same questions, and a folder with all that was said and what it shows."""

import datetime
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from kvfuse.errors import EvaluationError
from kvfuse.evaluation.asking import ask, prompts_of
from kvfuse.evaluation.build_methods import Models, methods_of
from kvfuse.evaluation.predictions import CONFIG, LATENCY, PREDICTIONS, VERSIONS, append, read_predictions, read_timings
from kvfuse.evaluation.recipe import EvaluationRecipe
from kvfuse.evaluation.report.comparison import write_comparison
from kvfuse.evaluation.report.write import write_report
from kvfuse.evaluation.tasks import load_task
from kvfuse.evaluation.timing import time_methods
from kvfuse.model import CacheToCache
from kvfuse.support.files import write_file
from kvfuse.support.processes import processes

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

VERSIONS_OF = ("kvfuse", "torch", "transformers", "lm_eval")
Say = Callable[[str], None]


@dataclass
class Asked:
    """What a run's folder holds already."""

    folder: Path

    def __post_init__(self) -> None:
        self.predictions = {(row.task, row.method, row.seed) for row in read_predictions(self.folder / PREDICTIONS)}
        self.timings = {row.task for row in read_timings(self.folder / LATENCY)}


def evaluate(recipe: EvaluationRecipe, out: Path, say: Say = print, quiet: bool = False) -> None:
    """Run a recipe; started again, a killed run goes on where it was, and asks nothing twice.

    Several processes share the questions (``torchrun``, ``accelerate launch``); the first writes.

    Args:
        recipe: Who is asked what.
        out: Folder for all of it; with several pairs, each has a folder of its own in there.
        say: Takes lines of progress, and the verdicts.
        quiet: Show no progress.

    Raises:
        EvaluationError: The folder is that of another recipe, or a task cannot be asked.
        MethodError, PairError, CheckpointError: A method, model or fuser that cannot be had.
    """
    say = processes().on_main_process(say)
    folders = []
    for pair, run in zip_longest(recipe.evaluation.pairs, recipe.runs()):  # one run without a pair, or one for each
        if pair is not None and not pair.can_run:
            say(f"{pair.name}: not run. {pair.why_not}")
            continue
        folders.append(out / pair.name if pair else out)
        evaluate_pair(run, folders[-1], say, quiet)
    if len(folders) > 1 and processes().is_main_process:
        write_comparison(folders, out / "report.html")
        say(f"side by side in {out / 'report.html'}")


def evaluate_pair(recipe: EvaluationRecipe, folder: Path, say: Say, quiet: bool) -> None:
    """One pair of a recipe. Arguments and errors as :func:`evaluate`."""
    section = recipe.evaluation
    tasks = {
        name: load_task(
            name,
            section.data,
            section.template,
            section.limit,
            section.only or None,
            section.harness_tasks,
            section.max_new_tokens,
        )
        for name in section.tasks
    }
    models = Models(recipe)
    _begin(recipe, folder)
    done = Asked(folder)
    for seed in range(len(recipe.fusers())):
        for method in methods_of(recipe, models.pair(seed), seed):
            for name, task in tasks.items():
                key = (name, method.name, seed if method.fuses else None)
                if key not in done.predictions:
                    say(f"{name}: {method.name}{f', seed {seed}' if method.fuses else ''}")
                    rows = ask(
                        method,
                        task,
                        name,
                        key[2],
                        folder / "unfinished" / "-".join(map(str, key)),
                        section.batch_size,
                        section.chat,
                        quiet,
                    )
                    if rows:
                        append(folder / PREDICTIONS, rows)
    if processes().is_main_process:
        _time(recipe, models.pair(0), tasks, folder, done, say)
        shutil.rmtree(folder / "unfinished", ignore_errors=True)
        record = write_report(folder)
        say("\n".join(f"{name}: {task['verdict']}" for name, task in record["tasks"].items()))
        say(f"written to {folder / 'report.html'}{f'. {section.note}' if section.note else ''}")
    processes().wait_for_everyone()


def _time(
    recipe: EvaluationRecipe, pair: CacheToCache, tasks: dict[str, "Task | Group"], folder: Path, done: Asked, say: Say
) -> None:
    """Latency, by the first process alone."""
    for name, task in tasks.items():
        if name in done.timings or not recipe.evaluation.timed:
            continue
        say(f"{name}: timing")
        questions = list(prompts_of(task, recipe.evaluation.chat))
        rows = [
            row
            for some in time_methods(methods_of(recipe, pair, 0), name, questions, recipe.evaluation.timed)
            for row in some
        ]
        append(folder / LATENCY, rows)


def _begin(recipe: EvaluationRecipe, folder: Path) -> None:
    """Write what is run, or refuse a folder where something else was."""
    if processes().is_main_process:
        config = yaml.safe_dump(_config(recipe), sort_keys=False, allow_unicode=True)
        there = folder / CONFIG
        if there.exists() and there.read_text(encoding="utf-8") != config:
            raise EvaluationError(
                f"expected {folder} to be new or begun by this very recipe, got one begun by another; choose another folder"
            )
        write_file(there, config)
        if not (folder / VERSIONS).exists():
            write_file(folder / VERSIONS, json.dumps(_versions(), indent=2) + "\n")
    processes().wait_for_everyone()


def _config(recipe: EvaluationRecipe) -> dict[str, Any]:
    content = recipe.model_dump(mode="json", exclude={"output"}, exclude_defaults=True)
    return {**content, "fuser": recipe.fusers(), "published": content["evaluation"].pop("published", [])}


def _versions() -> dict[str, str]:
    versions = {name.replace("_", "-"): importlib.metadata.version(name) for name in VERSIONS_OF}
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return {"date": datetime.date.today().isoformat(), "machine": device, **versions}
