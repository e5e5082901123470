"""``kvfuse train``: from a recipe to a fuser on disk, with its gain over the receiver alone."""

from collections.abc import Callable

import torch
import yaml

from kvfuse.checkpoint import save_fuser
from kvfuse.errors import RecipeError
from kvfuse.fusers import Fuser, describe_gates, make_fuser
from kvfuse.fusers.folder import require_replaceable
from kvfuse.language_model import LanguageModel
from kvfuse.model import CacheToCache
from kvfuse.support.files import write_file
from kvfuse.support.processes import on_cpu, processes
from kvfuse.training.closed_form import fit, read_pairs
from kvfuse.training.data.columns import from_columns
from kvfuse.training.data.encoding import Encoder, token_alignment
from kvfuse.training.data.prepare import Prepared, prepare, split
from kvfuse.training.loop.trainer import FuserTrainer
from kvfuse.training.loop.validation import Gain, Validation
from kvfuse.training.recipe import Recipe
from kvfuse.training.run_metadata import run_metadata

EXAMPLES_TO_PREPARE = 64
"""Training examples whose prompts a fuser may read before it is trained, to know the statistics of its inputs."""


def train(recipe: Recipe, say: Callable[[str], None] = print, quiet: bool = False) -> Gain:
    """Run a recipe. A killed run, started again with the same recipe, resumes from its last checkpoint.

    Args:
        recipe: See :class:`Recipe`.
        say: Takes lines of progress.
        quiet: Show no progress bar.

    Returns:
        The gain of the fuser on held-out examples.

    Raises:
        RecipeError, PairError, PromptError: Before anything is written, except a list of too many bad rows.
    """
    group = processes()
    say = group.on_main_process(say)
    # 1) Check the recipe and encode its data, before any model is loaded
    _require_own_folder(recipe)
    _require_gpus(recipe)
    prepared = prepare_data(recipe, say, quiet)
    training, held_out = split(prepared.examples, recipe.data.validation_share)
    # 2) Load the models and make a new fuser
    pair = new_pair(recipe)
    trainable = sum(parameter.numel() for parameter in pair.fusers[0].parameters())
    frozen = sum(model.model.num_parameters() for model in (pair.receiver, *pair.sharers))
    say(f"trainable: {trainable:,} parameters of the fuser; frozen: {frozen:,} of receiver and sharer")
    if group.is_main_process:
        write_file(recipe.output / "recipe.yaml", _as_yaml(recipe))
        _list_bad_rows(recipe, prepared)
    # 3) Train it, or fit it in closed form
    validation = Validation(pair, list(map(from_columns, held_out)), held_out["characters"][:])
    throughput = None
    if pair.fusers[0].closed_form:
        fit(pair, recipe.train, training)
    else:
        first = training.select(range(min(EXAMPLES_TO_PREPARE, len(training))))
        pair.fusers[0].prepare(read_pairs(pair, map(from_columns, first), recipe.train.batch_size))
        trainer = FuserTrainer(pair, recipe.train, training, recipe.output / "checkpoints", validation, quiet)
        throughput = trainer.resume()
    pair.fusers[0].eval()
    # 4) Measure and save
    gain = validation.measure()
    if group.is_main_process:
        save_fuser(pair.fusers[0], recipe.output / "fuser", _notes(gain, recipe))
        result = run_metadata(gain, throughput, pair, prepared, group.num_processes)
        write_file(recipe.output / "result.json", result)
    group.wait_for_everyone()  # the output is complete when any process returns
    say(str(gain))
    say(describe_gates(pair.fusers[0]))
    say(f"saved to {recipe.output / 'fuser'}{'' if throughput is None else f'; {throughput}'}")
    return gain


def prepare_data(recipe: Recipe, say: Callable[[str], None] = print, quiet: bool = False) -> Prepared:
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
            _list_bad_rows(recipe, prepared)
        raise
    return prepared


def new_pair(recipe: Recipe) -> CacheToCache:
    """Load both models and put a new fuser between them."""
    options = {"dtype": recipe.dtype, "device_map": processes().device}
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


def _require_own_folder(recipe: Recipe) -> None:
    """Refuse an output folder that another recipe or another program has started."""
    saved = recipe.output / "recipe.yaml"
    if recipe.output.exists() and not recipe.output.is_dir():
        raise RecipeError(f"expected output to be a folder, got the file {recipe.output}; choose another output")
    # Training removes broken checkpoints and replaces the fuser, so both must be its own
    foreign = [name for name in ("checkpoints", "fuser") if (recipe.output / name).exists()]
    if foreign and not saved.exists():
        raise RecipeError(
            f"expected {recipe.output} to be new or begun by this very recipe, "
            f"got {foreign[0]} of something else in it; choose another output"
        )
    require_replaceable(recipe.output / "fuser")
    # Version 0.1 wrote train.start, which had one other value
    if saved.exists() and saved.read_text().replace("train:\n  start: random\n", "train:\n") != _as_yaml(recipe):
        raise RecipeError(
            f"expected {recipe.output} to be new or begun by this very recipe, got one begun by another; "
            "choose another output"
        )


def _require_gpus(recipe: Recipe) -> None:
    """Refuse FSDP where Trainer would silently train a copy of the fuser in each process."""
    if recipe.train.fsdp and (on_cpu() or processes().num_processes == 1):
        raise RecipeError(
            "expected several processes with a GPU each for train.fsdp, got none such; "
            "start them with torchrun, or turn it off"
        )


def _list_bad_rows(recipe: Recipe, prepared: Prepared) -> None:
    if prepared.bad:
        write_file(recipe.output / "bad_rows.jsonl", prepared.bad_rows())


def _notes(gain: Gain, recipe: Recipe) -> str:
    return f"## Measured\n\n{gain.table()}\n\n{gain}\n\n## Recipe\n\n```yaml\n{_as_yaml(recipe)}```\n"


def _as_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
