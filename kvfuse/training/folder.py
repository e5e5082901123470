"""The folder of a training run: what it was begun with, whether it is finished, and a new beginning."""

import json
import shutil
from dataclasses import fields
from typing import Any

import yaml
from pydantic import ValidationError

from kvfuse.content import model_content
from kvfuse.errors import RecipeError, first_line
from kvfuse.fusers.folder import holds_fuser, require_replaceable
from kvfuse.support.files import write_file
from kvfuse.support.processes import processes
from kvfuse.support.run_folder import Inputs, changed_inputs, changed_settings, read_inputs, refuse_changes
from kvfuse.training.data.prepare import Prepared
from kvfuse.training.loop.validation import Gain
from kvfuse.training.recipe import Recipe

RECIPE, INPUTS, RESULT, BAD_ROWS = "recipe.yaml", "train-inputs.json", "result.json", "bad_rows.jsonl"
CHECKPOINTS, FUSER, CACHES = "checkpoints", "fuser", "caches-*"
WITHOUT_EFFECT = ("output", "data.workers", "data.max_bad_share", "train.report_to")
"""Keys of a recipe that change no weight."""
BY_CONTENT = ("receiver", "sharer", "data.path")
"""Keys that name what :func:`inputs_of` identifies by its content."""
DATA = "the data"


def inputs_of(recipe: Recipe, prepared: Prepared) -> Inputs:
    """Everything that training reads, by its content."""
    models = {"receiver": recipe.receiver, "sharer": recipe.sharer}
    read = {key: value for role, name in models.items() for key, value in model_content(role, name).items()}
    return {**read, DATA: prepared.content}


def require_own_folder(recipe: Recipe, *, overwrite: bool = False) -> None:
    """Refuse a folder that another program, or a run with other settings, has begun.

    Args:
        recipe: Whose ``output`` is meant.
        overwrite: Whether another run's is replaced.
    """
    output = recipe.output
    # 1) Training removes broken checkpoints and replaces the fuser, so both must be its own
    foreign = [name for name in (CHECKPOINTS, FUSER) if (output / name).exists()]
    if foreign and not (output / RECIPE).exists():
        raise RecipeError(
            f"expected {output} to be new or begun by this very recipe, "
            f"got {foreign[0]} of something else in it; choose another output"
        )
    require_replaceable(output / FUSER)
    # 2) What it has trained so far, it has trained with the settings of its recipe
    if _begun(recipe) and not overwrite:
        ignored = WITHOUT_EFFECT if read_inputs(output / INPUTS) is None else (*WITHOUT_EFFECT, *BY_CONTENT)
        changes = changed_settings(_saved_recipe(recipe), recipe.model_dump(mode="json"), ignored)
        refuse_changes(output, changes, RecipeError)


def require_same_inputs(recipe: Recipe, inputs: Inputs) -> None:
    """Refuse to go on where the content of data or models has changed since the run began."""
    if not _begun(recipe):
        return
    changes = changed_inputs(read_inputs(recipe.output / INPUTS), inputs)
    # Another tokenizer or template makes other examples of the same data
    if any(name.endswith(("tokenizer", "template")) for name in changes):
        changes = [name for name in changes if name != DATA]
    refuse_changes(recipe.output, changes, RecipeError)


def finished(recipe: Recipe) -> Gain | None:
    """The gain of a run that has ended; None for any other."""
    try:
        result = json.loads((recipe.output / RESULT).read_text(encoding="utf-8"))
        figures = {field.name: result.get(field.name) for field in fields(Gain)}
    except (OSError, ValueError, AttributeError):
        return None
    if not holds_fuser(recipe.output / FUSER):
        return None
    # JSON has lists for tuples
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in figures.items()
    }
    return Gain(**values)


def begin(recipe: Recipe, inputs: Inputs, prepared: Prepared, *, overwrite: bool = False) -> None:
    """Write what the run is begun with; the first process does it, the others wait.

    Args:
        recipe: Its ``output`` has been checked.
        inputs: Of :func:`inputs_of`.
        prepared: Its bad rows are listed.
        overwrite: Remove what an earlier run has left first.
    """
    if processes().is_main_process:
        if overwrite:
            _remove(recipe)
        write_file(recipe.output / RECIPE, as_yaml(recipe))
        write_file(recipe.output / INPUTS, json.dumps(inputs, indent=2) + "\n")
        list_bad_rows(recipe, prepared)
    processes().wait_for_everyone()


def list_bad_rows(recipe: Recipe, prepared: Prepared) -> None:
    """Write ``bad_rows.jsonl`` where there are any."""
    if prepared.bad:
        write_file(recipe.output / BAD_ROWS, prepared.bad_rows())


def as_yaml(recipe: Recipe) -> str:
    """The recipe with every default."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _begun(recipe: Recipe) -> bool:
    """Whether a run has left something that depends on its inputs: a checkpoint, precomputed caches or a fuser."""
    left = (f"{CHECKPOINTS}/checkpoint-*", CACHES, FUSER)
    return (recipe.output / RECIPE).exists() and any(any(recipe.output.glob(pattern)) for pattern in left)


def _saved_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe that a folder was begun with, in today's keys as far as they are known."""
    try:
        content = dict(yaml.safe_load((recipe.output / RECIPE).read_text(encoding="utf-8")))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise RecipeError(
            f"expected the recipe of a run in {recipe.output / RECIPE}, got: {first_line(error)}; choose another output"
        ) from error
    content.get("train", {}).pop("start", None)  # version 0.1 wrote it, with one value that had an effect
    try:
        return Recipe.model_validate(content).model_dump(mode="json")
    except ValidationError:
        return dict(content)


def _remove(recipe: Recipe) -> None:
    """Remove what training has written into its folder; what others have put there stays."""
    output = recipe.output
    for file in (RESULT, BAD_ROWS, INPUTS):
        (output / file).unlink(missing_ok=True)
    for folder in (output / CHECKPOINTS, *output.glob(CACHES)):
        shutil.rmtree(folder, ignore_errors=True)
    # A fuser with the user's files beside it stays until the new one takes its place
    if not require_replaceable(output / FUSER):
        shutil.rmtree(output / FUSER, ignore_errors=True)
