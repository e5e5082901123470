"""The folder of an evaluation: what its answers depend on, by content, and a new beginning."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kvfuse.content import NO_FILE, file_content, fuser_content, hash_json, model_content
from kvfuse.errors import EvaluationError
from kvfuse.evaluation.build_methods import Models, read_examples
from kvfuse.evaluation.predictions import CONFIG, LATENCY, METRICS, PREDICTIONS, VERSIONS, read_config
from kvfuse.evaluation.recipe import EvaluationRecipe
from kvfuse.evaluation.report.write import HTML, MARKDOWN
from kvfuse.support.files import write_file
from kvfuse.support.run_folder import Inputs, changed_inputs, changed_settings, read_inputs, refuse_changes

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

    Tasks = dict[str, Task | Group]

INPUTS, UNFINISHED = "eval-inputs.json", "unfinished"
WITHOUT_EFFECT = ("published",)
"""Keys of a configuration that change no answer. A note may be a smoke run's, whose answers mean nothing."""
BY_CONTENT = (
    *("receiver", "sharer", "fuser", "evaluation.fusers", "evaluation.subfolder", "evaluation.data"),
    *("evaluation.template", "evaluation.examples", "evaluation.settings.router"),
)
"""Keys that name what :func:`inputs_of` identifies by its content."""


def inputs_of(recipe: EvaluationRecipe, models: Models, tasks: "Tasks") -> Inputs:
    """Everything that an answer depends on, by its content."""
    section, pair = recipe.evaluation, models.pair(0)
    # 1) The models, and the fusers of each seed
    sharers = {f"sharer {number}": model for number, model in enumerate(pair.sharers, start=1)}
    roles = {"receiver": pair.receiver, **(sharers if len(sharers) > 1 else {"sharer": pair.sharers[0]})}
    inputs = {key: value for role, model in roles.items() for key, value in model_content(role, model.name).items()}
    for seed in range(models.num_seeds if models.fuse else 0):
        inputs[f"the fuser of seed {seed}"] = hash_json([fuser_content(*source) for source in models.sources(seed)])
    # 2) The questions, and the files beside them
    inputs |= {f"the questions of {name}": _questions(task) for name, task in tasks.items()}
    examples = section.examples and read_examples(section.examples, section.shots)
    return {
        **inputs,
        "the template": file_content(section.template),
        "the router": file_content(section.settings.get("router")),
        "the examples": hash_json(examples) if examples else NO_FILE,
    }


def require_same_settings(recipe: EvaluationRecipe, folder: Path) -> None:
    """Refuse a folder with answers that were asked for with other settings."""
    if _begun(folder) and (folder / CONFIG).exists():
        ignored = WITHOUT_EFFECT if read_inputs(folder / INPUTS) is None else (*WITHOUT_EFFECT, *BY_CONTENT)
        changes = changed_settings(read_config(folder), configuration(recipe), ignored)
        refuse_changes(folder, changes, EvaluationError)


def require_same_inputs(folder: Path, inputs: Inputs) -> None:
    """Refuse to add to answers that were given with other models, fusers, questions or files."""
    if _begun(folder):
        refuse_changes(folder, changed_inputs(read_inputs(folder / INPUTS), inputs), EvaluationError)


def begin(recipe: EvaluationRecipe, folder: Path, inputs: Inputs, versions: dict[str, str], *, overwrite: bool) -> None:
    """Write what the answers depend on.

    Args:
        recipe: Of one pair.
        folder: It has been checked.
        inputs: Of :func:`inputs_of`.
        versions: Libraries, machine, date; those of the beginning are kept.
        overwrite: Remove what an earlier evaluation has left first.
    """
    if overwrite:
        for file in (PREDICTIONS, LATENCY, METRICS, VERSIONS, INPUTS, HTML, MARKDOWN):
            (folder / file).unlink(missing_ok=True)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    write_file(folder / CONFIG, yaml.safe_dump(configuration(recipe), sort_keys=False, allow_unicode=True))
    write_file(folder / INPUTS, json.dumps(inputs, indent=2) + "\n")
    if not (folder / VERSIONS).exists():
        write_file(folder / VERSIONS, json.dumps(versions, indent=2) + "\n")


def configuration(recipe: EvaluationRecipe) -> dict[str, Any]:
    """A recipe as ``config.yaml`` has it."""
    # only what differs from the defaults; ``output`` says where things are, not what is run
    content = recipe.model_dump(mode="json", exclude={"output"}, exclude_defaults=True)
    return {**content, "fuser": recipe.fusers(), "published": content["evaluation"].pop("published", [])}


def _begun(folder: Path) -> bool:
    """Whether an answer or a time is there, which belongs to the configuration beside it."""
    return any((folder / name).exists() for name in (PREDICTIONS, LATENCY, UNFINISHED))


def _questions(task: "Task | Group") -> str:
    parts = task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]
    return hash_json([[part.config.task, list(part.eval_docs)] for part in parts])
