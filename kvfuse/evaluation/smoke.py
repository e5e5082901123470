"""``kvfuse eval --smoke``: a recipe from its first line to its last in seconds, on tiny random models and made-up questions."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from kvfuse.checkpoint import save_fuser
from kvfuse.errors import EvaluationError
from kvfuse.evaluation.recipe import EvaluationRecipe
from kvfuse.evaluation.tasks import made_up, task_names
from kvfuse.evaluation.tasks.longbench import FAMILIES
from kvfuse.language_model import LanguageModel
from kvfuse.methods import Router
from kvfuse.support.processes import processes
from kvfuse.testing import tiny_fuser, tiny_model, tiny_tokenizer

NOTE = "A smoke run: the models are tiny and random, the questions made up. No measured figure of it says anything about any model."
QUESTIONS, TIMED, NEW_TOKENS, LONGEST = 3, 1, 4, 4096


def tiny(recipe: EvaluationRecipe, out: Path) -> EvaluationRecipe:
    """The same recipe with tiny random models and fusers, as many as it has, and a few made-up questions of each data set.

    Nothing is fetched. Figures of papers stay, so that reports are written whole; the reports begin with :data:`NOTE`.

    Args:
        recipe: What would be run.
        out: Its folder; models and questions are put into ``tiny`` in there.

    Raises:
        EvaluationError: A task is not one of kvfuse's.
    """
    section, folder, runs = recipe.evaluation, out / "tiny", recipe.runs()
    for name in (name for run in runs for name in run.evaluation.tasks):
        if name not in task_names():
            raise EvaluationError(
                f"expected tasks of kvfuse for a smoke run, got {name!r}, whose data would be fetched; leave it out"
            )
    if processes().is_main_process:
        _write(folder, max(map(_sharers, runs)), max(len(run.fusers()) for run in runs))
    processes().wait_for_everyone()
    small = {
        "data": folder,
        "limit": QUESTIONS,
        "only": [],
        "timed": min(section.timed, TIMED),
        "batch_size": 8,
        "note": NOTE,
    }
    small |= {"max_new_tokens": NEW_TOKENS, "settings": _settings(section.settings, folder)}
    small |= {"examples": folder / "examples.jsonl"} if section.examples else {}
    pairs = [
        pair.model_copy(
            update={**_models(run, folder), **_fusers(run, folder), "data": None, "max_new_tokens": None, "why_not": ""}
        )
        for pair, run in zip(section.pairs, runs, strict=False)
    ]
    first = _fusers(runs[0], folder)
    return recipe.model_copy(
        update={
            **_models(runs[0], folder),
            "dtype": "float32",
            "evaluation": section.model_copy(update={**small, **first, "pairs": pairs}),
        }
    )


def _sharers(run: EvaluationRecipe) -> int:
    """How many: where the fusers name their sharers, as many as there are fusers."""
    fuser = run.fusers()[0]
    return 1 if isinstance(fuser, str) else len(fuser)


def _models(run: EvaluationRecipe, folder: Path) -> dict[str, Any]:
    return {
        "receiver": str(folder / "receiver"),
        "sharer": [str(folder / f"sharer-{place}") for place in range(_sharers(run))],
    }


def _fusers(run: EvaluationRecipe, folder: Path) -> dict[str, Any]:
    places = range(_sharers(run))
    return {
        "fusers": [[str(_fuser(folder, place, seed)) for place in places] for seed in range(len(run.fusers()))],
        "subfolder": "",
    }


def _fuser(folder: Path, place: int, seed: int) -> Path:
    return folder / f"fuser-{place}-{seed}"


def _settings(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    router = {"router": str(folder / "router.safetensors")} if "router" in settings else {}
    return {**settings, "hint_tokens": NEW_TOKENS, **router}


def _write(folder: Path, sharers: int, seeds: int) -> None:
    """Models, fusers, a router, examples and questions: the same at each start."""
    receiver = _model(folder / "receiver", "qwen3")
    for place in range(sharers):
        sharer = _model(folder / f"sharer-{place}", "llama", 300 + place)
        for seed in range(seeds):
            save_fuser(tiny_fuser(receiver, sharer, seed=seed), _fuser(folder, place, seed))
    save_file(Router(len(receiver.tokenizer)).state_dict(), folder / "router.safetensors")
    (folder / "examples.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "response": "2"}) + "\n", encoding="utf-8")
    subjects = [name + ending for names in FAMILIES.values() for name in names.split() for ending in ("", "_e")]
    for source in made_up.ROWS:
        made_up.write(folder, source, subjects if source == "longbench" else (), QUESTIONS)


def _model(folder: Path, family: str, vocab_size: int = 320) -> LanguageModel:
    """A model with another tokenizer for each ``vocab_size``, as its folder has it."""
    model = tiny_model(family, tiny_tokenizer(vocab_size), max_position_embeddings=LONGEST)
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return LanguageModel.from_pretrained(folder)
