"""``kvfuse eval``: compare methods on the same questions, in a folder with all answers and the report."""

import datetime
import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvfuse.errors import EvaluationError
from kvfuse.evaluation.asking import time_methods
from kvfuse.evaluation.build_methods import Models, methods_of
from kvfuse.evaluation.folder import UNFINISHED, begin, inputs_of, require_same_inputs, require_same_settings
from kvfuse.evaluation.harness.evaluate_task import evaluate_task, prompts_of
from kvfuse.evaluation.predictions import LATENCY, PREDICTIONS, append, read_predictions, read_timings
from kvfuse.evaluation.recipe import EvaluationRecipe
from kvfuse.evaluation.report.comparison import write_comparison
from kvfuse.evaluation.report.write import HTML, write_report
from kvfuse.evaluation.scoring.audit import table as audit_table
from kvfuse.evaluation.smoke import tiny
from kvfuse.evaluation.tasks import load_task
from kvfuse.methods import Method, Unfused
from kvfuse.model import CacheToCache
from kvfuse.support.processes import processes
from kvfuse.support.run_folder import claim

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

    Tasks = dict[str, Task | Group]

PACKAGES = ("kvfuse", "torch", "transformers", "lm_eval")
Say = Callable[[str], None]


def evaluate(
    recipe: EvaluationRecipe,
    out: Path,
    say: Say = print,
    quiet: bool = False,
    *,
    overwrite: bool = False,
    smoke: bool = False,
) -> None:
    """Run a recipe. Started again, a killed run continues and asks nothing twice.

    Several processes share the questions (``torchrun``, ``accelerate launch``); the first one writes.

    Args:
        recipe: Models, methods and tasks.
        out: Folder of the run; with several pairs, each has its own folder in it.
        say: Called with lines of progress, and the verdicts.
        quiet: Show no progress bars.
        overwrite: Start again where the folder holds an evaluation, also one with other settings, models or questions.
        smoke: Ask tiny random models made-up questions (:func:`kvfuse.evaluation.smoke.tiny`).

    Raises:
        EvaluationError: The folder has answers to other questions, of other models or settings, another evaluation
            is running in it, or it cannot be written; or a task cannot be asked.
        MethodError, PairError, CheckpointError: A method, model or fuser cannot be loaded.
    """
    say = processes().on_main_process(say)
    with claim(out, EvaluationError):
        _evaluate(tiny(recipe, out) if smoke else recipe, out, say, quiet, overwrite)


def _evaluate(recipe: EvaluationRecipe, out: Path, say: Say, quiet: bool, overwrite: bool) -> None:
    folders = []
    for pair, run in zip_longest(recipe.evaluation.pairs, recipe.runs()):  # a run per pair, or one without a pair
        if pair is not None and not pair.can_run:
            say(f"{pair.name}: not run. {pair.why_not}")
            continue
        folders.append(out / pair.name if pair else out)
        evaluate_pair(run, folders[-1], say, quiet, overwrite)
    if len(folders) > 1 and processes().is_main_process:
        write_comparison(folders, out / HTML)
        say(f"side by side in {out / HTML}")


def evaluate_pair(recipe: EvaluationRecipe, folder: Path, say: Say, quiet: bool, overwrite: bool = False) -> None:
    """Run a recipe of one pair. Arguments and errors as of :func:`evaluate`."""
    section = recipe.evaluation
    # 1) load data, then models, so that wrong settings and data are found at once
    if not overwrite:
        require_same_settings(recipe, folder)
    options = section.model_dump(include={"template", "limit", "harness_tasks", "max_new_tokens"})
    tasks = {name: load_task(name, section.data, only=section.only or None, **options) for name in section.tasks}
    models = Models(recipe)
    methods_of(recipe, models.pair(0), 0)  # what cannot be made leaves no trace
    if processes().is_main_process:
        inputs = inputs_of(recipe, models, tasks)
        if not overwrite:
            require_same_inputs(folder, inputs)
        begin(recipe, folder, inputs, _versions(), overwrite=overwrite)
    processes().wait_for_everyone()
    # 2) ask what is not answered yet
    for method, name, task, seed in _pending(recipe, models, tasks, folder):
        say(f"{name}: {method.name}{'' if seed is None else f', seed {seed}'}")
        cache = folder / UNFINISHED / f"{name}-{method.name}-{seed}"
        rows = evaluate_task(method, task, name, seed, cache, section.batch_size, chat=section.chat, quiet=quiet)
        if rows:
            append(folder / PREDICTIONS, rows)
    # 3) time and report
    if processes().is_main_process:
        _time(recipe, models.pair(0), tasks, folder, say)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        record = write_report(folder)
        for name, task in record["tasks"].items():
            say(f"{name}: {(task['audit'] or task)['verdict']}")
            for label, figure in audit_table(task["audit"]) if task["audit"] else ():
                say(f"  {label}: {figure}")
        say(f"written to {folder / HTML}{f'. {section.note}' if section.note else ''}")
    processes().wait_for_everyone()


def _pending(
    recipe: EvaluationRecipe, models: Models, tasks: "Tasks", folder: Path
) -> "Iterator[tuple[Method, str, Task | Group, int | None]]":
    """Yields each method and task without answers, with the task's name and the seed of the method's fuser."""
    answered = {(row.task, row.method, row.seed) for row in read_predictions(folder / PREDICTIONS)}
    for seed in range(models.num_seeds):
        for method in methods_of(recipe, models.pair(seed), seed):
            fuser_seed = seed if method.fuses else None
            for name, task in tasks.items():
                if (name, method.name, fuser_seed) not in answered:
                    yield method, name, task, fuser_seed


def _time(recipe: EvaluationRecipe, pair: CacheToCache | Unfused, tasks: "Tasks", folder: Path, say: Say) -> None:
    """Time the tasks that are not timed yet, in one process."""
    section, timed = recipe.evaluation, {row.task for row in read_timings(folder / LATENCY)}
    for name, task in tasks.items():
        if name not in timed and section.timed:
            say(f"{name}: timing")
            questions = list(prompts_of(task, section.chat))
            append(folder / LATENCY, time_methods(methods_of(recipe, pair, 0), name, questions, section.timed))


def _versions() -> dict[str, str]:
    versions = {name.replace("_", "-"): importlib.metadata.version(name) for name in PACKAGES}
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"date": datetime.date.today().isoformat(), "machine": device, **versions}
