"""``kvfuse eval``: methods against each other on the same questions, and a folder with all that was said and what it shows."""

import datetime
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import load_file

from kvfuse.chat import Message
from kvfuse.checkpoint import load_fuser, write_file
from kvfuse.errors import EvaluationError
from kvfuse.evaluation.asking import ask, prompts_of
from kvfuse.evaluation.comparison import write_comparison
from kvfuse.evaluation.predictions import CONFIG, LATENCY, PREDICTIONS, VERSIONS, append, read_predictions, read_timings
from kvfuse.evaluation.recipe import EvaluationRecipe
from kvfuse.evaluation.report import write_report
from kvfuse.evaluation.tasks import load_task
from kvfuse.evaluation.tasks.readouts import without_choices
from kvfuse.evaluation.timing import time_methods
from kvfuse.language_model import LanguageModel
from kvfuse.methods import Method, Router, make_method
from kvfuse.model import CacheToCache
from kvfuse.processes import processes

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

VERSIONS_OF = ("kvfuse", "torch", "transformers", "lm_eval")
Say = Callable[[str], None]


@dataclass
class Models:
    """The models of a pair, loaded once, and its fusers one seed at a time."""

    recipe: EvaluationRecipe

    def __post_init__(self) -> None:
        section = self.recipe.evaluation
        self._options = {"dtype": self.recipe.dtype, "device_map": processes().device}
        self._first = CacheToCache.from_pretrained(
            self.recipe.receiver, self.recipe.sharer, self.recipe.fusers()[0], section.subfolder, section.fusion, **self._options
        )

    def pair(self, seed: int) -> CacheToCache:
        """With the fuser of a seed, or where there are several sharers the fusers."""
        if seed == 0:
            return self._first
        section, first = self.recipe.evaluation, self._first
        sources = _as_list(self.recipe.fusers()[seed])
        subfolders = [section.subfolder] * len(sources) if isinstance(section.subfolder, str) else section.subfolder
        fusers = [load_fuser(source, inside) for source, inside in zip(sources, subfolders, strict=True)]
        for fuser, one in zip(fusers, first.fusers, strict=True):
            fuser.to(one.device, one.dtype)
        return CacheToCache(first.receiver, first.sharers, fusers, section.fusion)


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
    names = [pair.name for pair in recipe.evaluation.pairs]
    folders = []
    for name, run in zip(names or [""], recipe.runs(), strict=True):
        if name and (reason := _reason(recipe, name)):
            say(f"{name}: not run. {reason}")
            continue
        folders.append(out / name)
        evaluate_pair(run, folders[-1], say, quiet)
    if len(folders) > 1 and processes().is_main_process:
        write_comparison(folders, out / "report.html")
        say(f"side by side in {out / 'report.html'}")


def evaluate_pair(recipe: EvaluationRecipe, folder: Path, say: Say, quiet: bool) -> None:
    """One pair of a recipe. Arguments and errors as :func:`evaluate`."""
    section = recipe.evaluation
    tasks = {
        name: load_task(name, section.data, section.template, section.limit, section.only or None, section.harness_tasks)
        for name in section.tasks
    }
    models = Models(recipe)
    _begin(recipe, folder)
    done = Asked(folder)
    for seed in range(len(recipe.fusers())):
        for method in _methods(recipe, models.pair(seed), seed):
            for name, task in tasks.items():
                key = (name, method.name, seed if method.fuses else None)
                if key not in done.predictions:
                    say(f"{name}: {method.name}{f', seed {seed}' if method.fuses else ''}")
                    rows = ask(
                        method, task, name, key[2], folder / "unfinished" / "-".join(map(str, key)), section.batch_size, section.chat, quiet
                    )
                    if rows:
                        append(folder / PREDICTIONS, rows)
    if processes().is_main_process:
        _time(recipe, models.pair(0), tasks, folder, done, say)
        shutil.rmtree(folder / "unfinished", ignore_errors=True)
        record = write_report(folder)
        say("\n".join(f"{name}: {task['verdict']}" for name, task in record["tasks"].items()))
        say(f"written to {folder / 'report.html'}")
    processes().wait_for_everyone()


def _time(recipe: EvaluationRecipe, pair: CacheToCache, tasks: dict[str, "Task | Group"], folder: Path, done: Asked, say: Say) -> None:
    """Latency, by the first process alone."""
    for name, task in tasks.items():
        if name in done.timings or not recipe.evaluation.timed:
            continue
        say(f"{name}: timing")
        questions = list(prompts_of(task, recipe.evaluation.chat))
        rows = [row for some in time_methods(_methods(recipe, pair, 0), name, questions, recipe.evaluation.timed) for row in some]
        append(folder / LATENCY, rows)


def _methods(recipe: EvaluationRecipe, pair: CacheToCache, seed: int) -> list[Method]:
    """All methods with the fuser of a seed; of later seeds those that fuse."""
    section = recipe.evaluation
    settings = {"without_options": without_choices, **section.settings}
    if "router" in settings:
        settings["router"] = _load_router(settings["router"], pair.receiver)
    if section.examples is not None:
        settings["examples"] = _read_examples(section.examples, section.shots)
    methods = [make_method(name, pair, **settings) for name in section.methods]
    return [method for method in methods if seed == 0 or method.fuses]


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
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"date": datetime.date.today().isoformat(), "machine": device, **versions}


def _load_router(path: str | Path, receiver: LanguageModel) -> Router:
    try:
        router = Router(len(receiver.tokenizer))
        router.load_state_dict(load_file(path))
    except (OSError, RuntimeError) as error:
        raise EvaluationError(f"expected a router for {receiver.name} at {path}, got: {str(error).splitlines()[0]}; train one") from error
    return router


def _read_examples(path: Path, shots: int) -> list[Message]:
    """The first examples of a file, as turns of a chat."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:shots]]
        turns = [({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"expected lines with prompt and response in {path}, got: {error}; correct the file") from error
    return [message for turn in turns for message in turn]


def _reason(recipe: EvaluationRecipe, name: str) -> str:
    return next(pair.why_not for pair in recipe.evaluation.pairs if pair.name == name)


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
