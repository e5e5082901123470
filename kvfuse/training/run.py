"""``kvfuse train``: from a recipe to a fuser on disk, with its gain over the receiver alone."""

from collections.abc import Callable
from dataclasses import asdict

import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from kvfuse.checkpoint import save_fuser
from kvfuse.errors import RecipeError, nearest
from kvfuse.fusers import Fuser, describe_gates, make_fuser
from kvfuse.language_model import LanguageModel
from kvfuse.model import CacheToCache
from kvfuse.support.files import write_file
from kvfuse.support.processes import on_cpu, processes
from kvfuse.support.run_folder import Inputs, claim
from kvfuse.training import folder
from kvfuse.training.closed_form import fit, read_pairs
from kvfuse.training.data.columns import from_columns
from kvfuse.training.data.encoding import Encoder, token_alignment
from kvfuse.training.data.prepare import Prepared, prepare, split
from kvfuse.training.loop.trainer import FuserTrainer
from kvfuse.training.loop.validation import Gain, Validation
from kvfuse.training.plan import Plan, plan
from kvfuse.training.recipe import Recipe
from kvfuse.training.run_metadata import run_metadata

Say = Callable[[str], None]
EXAMPLES_TO_PREPARE = 64
"""Training examples whose prompts a fuser may read before it is trained, to know the statistics of its inputs."""


def train(recipe: Recipe, say: Say = print, quiet: bool = False, overwrite: bool = False) -> Gain:
    """Run a recipe. A killed run, started again with the same recipe, resumes from its last checkpoint.

    Args:
        recipe: See :class:`Recipe`.
        say: Takes lines of progress.
        quiet: Show no progress bar.
        overwrite: Start again where the folder holds a run, also one with other settings, data or models.

    Returns:
        The gain of the fuser on held-out examples. A finished run is not touched again.

    Raises:
        RecipeError, PairError, PromptError: Before anything is written, except a list of too many bad rows.
    """
    say = processes().on_main_process(say)
    with claim(recipe.output, RecipeError):
        # 1) Check everything that can be checked before a model is loaded
        prepared, inputs = _check(recipe, say, quiet, overwrite)
        gain = None if overwrite else folder.finished(recipe)
        if gain is not None:
            say(f"{gain}\n{recipe.output} is finished; to train it again, start again (--overwrite)")
            return gain
        # 2) Load the models, make a new fuser and train it
        pair = new_pair(recipe)
        trainable = sum(parameter.numel() for parameter in pair.fusers[0].parameters())
        frozen = sum(model.model.num_parameters() for model in (pair.receiver, *pair.sharers))
        say(f"trainable: {trainable:,} parameters of the fuser; frozen: {frozen:,} of receiver and sharer")
        folder.begin(recipe, inputs, prepared, overwrite=overwrite)
        return _train(recipe, pair, prepared, say, quiet)


def dry_run(recipe: Recipe, say: Say = print, overwrite: bool = False) -> Plan:
    """Check a recipe and its folder as :func:`train` does, and estimate the run. Nothing is left in the folder."""
    with claim(recipe.output, RecipeError):
        prepared, _ = _check(recipe, processes().on_main_process(say), False, overwrite)
        return plan(recipe, prepared)


def _check(recipe: Recipe, say: Say, quiet: bool, overwrite: bool) -> tuple[Prepared, Inputs]:
    """Refuse what cannot be run, and encode the data. Inputs are empty in all processes but the first."""
    folder.require_own_folder(recipe, overwrite=overwrite)
    _require_gpus(recipe)
    _require_logger(recipe)
    prepared = prepare_data(recipe, say, quiet)
    examples = len(split(prepared.examples, recipe.data.validation_share)[0])
    if recipe.train.batch_size > examples:
        say(f"train.batch_size is {recipe.train.batch_size:,}: every batch has all {examples:,} training examples")
    if not processes().is_main_process:
        return prepared, {}
    inputs = folder.inputs_of(recipe, prepared)
    if not overwrite:
        folder.require_same_inputs(recipe, inputs)
    return prepared, inputs


def _train(recipe: Recipe, pair: CacheToCache, prepared: Prepared, say: Say, quiet: bool) -> Gain:
    group = processes()
    training, held_out = split(prepared.examples, recipe.data.validation_share)
    # 1) Train the fuser, or fit it in closed form
    validation = Validation(pair, list(map(from_columns, held_out)), held_out["characters"][:])
    throughput = None
    if pair.fusers[0].closed_form:
        fit(pair, recipe.train, training)
    else:
        first = training.select(range(min(EXAMPLES_TO_PREPARE, len(training))))
        pair.fusers[0].prepare(read_pairs(pair, map(from_columns, first), recipe.train.batch_size))
        trainer = FuserTrainer(pair, recipe.train, training, recipe.output / folder.CHECKPOINTS, validation, quiet)
        throughput = trainer.resume()
    pair.fusers[0].eval()
    # 2) Measure and save
    gain, fuser = validation.measure(), recipe.output / folder.FUSER
    if group.is_main_process:
        save_fuser(pair.fusers[0], fuser, _notes(gain, recipe))
        result = run_metadata(gain, throughput, pair, prepared, group.num_processes)
        write_file(recipe.output / folder.RESULT, result)
    group.wait_for_everyone()  # the output is complete when any process returns
    say(str(gain))
    say(describe_gates(pair.fusers[0]))
    say(f"saved to {fuser}{'' if throughput is None else f'; {throughput}'}")
    return gain


def prepare_data(recipe: Recipe, say: Say = print, quiet: bool = False) -> Prepared:
    """Encode a recipe's data before its models are loaded; the first process of a machine does it for the others.

    Raises:
        RecipeError: Too many rows are bad (listed in ``output/bad_rows.jsonl``), or several processes would stream.
    """
    group = processes()
    if recipe.data.streaming and group.num_processes > 1:
        raise RecipeError(
            f"expected data that is kept on disk for {group.num_processes} processes, got data.streaming=true, "
            "which each would read for itself; turn it off"
        )
    with group.local_main_process_first():
        prepared = prepare(recipe.data, Encoder.load(recipe), quiet or not group.is_local_main_process)
    group.on_main_process(say)(str(prepared))
    try:
        prepared.require_enough(recipe.data)
    except RecipeError:
        if group.is_main_process:
            folder.list_bad_rows(recipe, prepared)
        raise
    return prepared


def new_pair(recipe: Recipe) -> CacheToCache:
    """Load both models and put a new fuser between them."""
    options = {"dtype": recipe.dtype, "device_map": processes().device, **asdict(recipe.chat_options)}
    receiver, sharer = (LanguageModel.from_pretrained(name, **options) for name in (recipe.receiver, recipe.sharer))
    torch.manual_seed(recipe.train.seed)
    return CacheToCache(receiver, [sharer], [_new_fuser(recipe, receiver=receiver, sharer=sharer)])


def _new_fuser(recipe: Recipe, *, receiver: LanguageModel, sharer: LanguageModel) -> Fuser:
    """A new float32 fuser of the recipe's kind that remembers this pair."""
    identical = receiver.identity.tokenizer == sharer.identity.tokenizer
    return make_fuser(
        recipe.fuser.kind,
        receiver=receiver.identity.to_dict(),
        sharer=sharer.identity.to_dict(),
        token_alignment=token_alignment(recipe, identical),
        **recipe.fuser.options,
    ).to(receiver.model.device)


def _require_gpus(recipe: Recipe) -> None:
    """Refuse FSDP where Trainer would silently train a copy of the fuser in each process."""
    if recipe.train.fsdp and (on_cpu() or processes().num_processes == 1):
        raise RecipeError(
            "expected several processes with a GPU each for train.fsdp, got none such; "
            "start them with torchrun, or turn it off"
        )


def _require_logger(recipe: Recipe) -> None:
    """Refuse a logger that Trainer does not know, or whose package is not installed."""
    name, known = recipe.train.report_to, ["none", "all", *INTEGRATION_TO_CALLBACK]
    if name not in known:
        raise RecipeError(
            f"expected train.report_to to be one of {', '.join(known)}, got {name!r}; "
            f"did you mean {nearest(name, known)!r}?"
        )
    if name not in ("none", "all", *get_available_reporting_integrations()):
        raise RecipeError(f"expected the package of train.report_to={name}, got none; install {name}, or leave it out")


def _notes(gain: Gain, recipe: Recipe) -> str:
    return f"## Measured\n\n{gain.table()}\n\n{gain}\n\n## Recipe\n\n```yaml\n{folder.as_yaml(recipe)}```\n"
