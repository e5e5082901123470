"""``kvfuse eval --smoke``: a whole recipe in seconds, on tiny random models and made-up questions."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from kvfuse.checkpoint import save_fuser
from kvfuse.errors import EvaluationError
from kvfuse.evaluation.recipe import EvaluationRecipe, EvaluationSection
from kvfuse.evaluation.tasks import made_up, task_names
from kvfuse.evaluation.tasks.longbench import FAMILIES
from kvfuse.language_model import LanguageModel
from kvfuse.methods import Router
from kvfuse.support.processes import processes
from kvfuse.testing import tiny_fuser, tiny_model, tiny_tokenizer

NOTE = "A smoke run: the models are tiny and random, the questions made up. Its measured figures mean nothing."
QUESTIONS, TIMED, NEW_TOKENS, MAX_POSITIONS = 3, 1, 4, 4096


def tiny(recipe: EvaluationRecipe, out: Path) -> EvaluationRecipe:
    """Returns the same recipe with tiny random models and fusers, as many as it has, and a few made-up questions.

    Nothing is downloaded. Published figures stay, so that reports are complete; the reports begin with :data:`NOTE`.

    Args:
        recipe: The recipe.
        out: Folder of the run; models and questions are written to its folder ``tiny``.

    Raises:
        EvaluationError: A task is not one of kvfuse's.
    """
    folder, runs = out / "tiny", recipe.runs()
    # 1) refuse tasks of other packages
    for name in (name for run in runs for name in run.evaluation.tasks):
        if name not in task_names():
            raise EvaluationError(
                f"expected tasks of kvfuse for a smoke run, got {name!r}, whose data would be fetched; leave it out"
            )
    # 2) write models and questions
    if processes().is_main_process:
        _write(folder, max(map(_num_sharers, runs)), max(len(run.fusers()) for run in runs))
    processes().wait_for_everyone()
    # 3) point the recipe to them
    own = {"data": None, "max_new_tokens": None, "why_not": ""}
    pairs = [
        pair.model_copy(update={**_models(run, folder), **_fusers(run, folder), **own})
        for pair, run in zip(recipe.evaluation.pairs, runs, strict=False)
    ]
    section = {**_section(recipe.evaluation, folder), **_fusers(runs[0], folder), "pairs": pairs}
    evaluation = recipe.evaluation.model_copy(update=section)
    return recipe.model_copy(update={**_models(runs[0], folder), "dtype": "float32", "evaluation": evaluation})


def _section(section: EvaluationSection, folder: Path) -> dict[str, Any]:
    """Returns the keys that make an evaluation small."""
    # a router belongs to the receiver's tokens, so the recipe's cannot be used
    router = {"router": str(folder / "router.safetensors")} if "router" in section.settings else {}
    return {
        "data": folder,
        "limit": QUESTIONS,
        "only": [],
        "timed": min(section.timed, TIMED),
        "batch_size": 8,
        "note": NOTE,
        "max_new_tokens": NEW_TOKENS,
        "settings": {**section.settings, "hint_tokens": NEW_TOKENS, **router},
        "examples": section.examples and folder / "examples.jsonl",
    }


def _num_sharers(run: EvaluationRecipe) -> int:
    """Returns the number of sharers, which is that of the fusers of a seed."""
    names = next(iter(run.fusers()), run.sharer)  # without fusers, the sharers are named
    return len(names) if isinstance(names, list) else 1


def _models(run: EvaluationRecipe, folder: Path) -> dict[str, Any]:
    sharers = [str(folder / f"sharer-{index}") for index in range(_num_sharers(run))]
    return {"receiver": str(folder / "receiver"), "sharer": sharers}


def _fusers(run: EvaluationRecipe, folder: Path) -> dict[str, Any]:
    seeds, sharers = range(len(run.fusers())), range(_num_sharers(run))
    return {"fusers": [[str(_fuser(folder, index, seed)) for index in sharers] for seed in seeds], "subfolder": ""}


def _fuser(folder: Path, sharer: int, seed: int) -> Path:
    return folder / f"fuser-{sharer}-{seed}"


def _write(folder: Path, num_sharers: int, num_seeds: int) -> None:
    """Write models, fusers, a router, examples and questions, which are the same every time."""
    # each sharer has its own vocabulary, so that alignment is not the identity
    receiver = _model(folder / "receiver", "qwen3")
    for index in range(num_sharers):
        sharer = _model(folder / f"sharer-{index}", "llama", 300 + index)
        for seed in range(num_seeds):
            save_fuser(tiny_fuser(receiver, sharer, seed=seed), _fuser(folder, index, seed))
    save_file(Router(len(receiver.tokenizer)).state_dict(), folder / "router.safetensors")
    (folder / "examples.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "response": "2"}) + "\n", encoding="utf-8")
    subjects = [name + suffix for names in FAMILIES.values() for name in names.split() for suffix in ("", "_e")]
    for source in made_up.ROWS:
        made_up.write(folder, source, subjects if source == "longbench" else (), QUESTIONS)


def _model(folder: Path, family: str, vocab_size: int = 320) -> LanguageModel:
    """Returns a model as loaded from its folder; each ``vocab_size`` has its own tokenizer."""
    model = tiny_model(family, tiny_tokenizer(vocab_size), max_position_embeddings=MAX_POSITIONS)
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return LanguageModel.from_pretrained(folder)
