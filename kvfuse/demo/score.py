"""Score all methods on the embedded pair's held-out questions, with the evaluator that ``kvfuse eval`` uses."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from kvfuse.demo.lessons import HINT_READING, HINT_REQUEST
from kvfuse.demo.pair_folder import PairFolder
from kvfuse.demo.questions import Question, all_questions
from kvfuse.evaluation import asking
from kvfuse.evaluation.predictions import Prediction, Run
from kvfuse.evaluation.report.verdict import FUSED, MISMATCHED, RECEIVER
from kvfuse.evaluation.scoring.metrics import latency, paired
from kvfuse.evaluation.scoring.statistics import bootstrap_mean
from kvfuse.evaluation.scoring.task_scores import RIGHT, TaskScores
from kvfuse.methods import Method, make_method
from kvfuse.methods.donors import choose_donors

METHODS = ("receiver", "sharer", "text-to-text", "routing", "cascade", "cache-to-cache", "zeroed", "mismatched")
BATCH_SIZE = 64
TIMED_QUESTIONS = 60
OPTIONS = {"max_new_tokens": 24, "do_sample": False}
TASK = "embedded"

Progress = Callable[[str, int], None]
"""Called with a method's name and the number of questions that it has just answered."""


def make_methods(folder: PairFolder, seed: int, questions: Sequence[Question]) -> dict[str, Method]:
    """Returns all methods by name, with the fuser of a training seed."""
    # hints and the cascade's threshold are those that the pair was built with
    settings = {
        "hint_request": HINT_REQUEST,
        "hint_reading": HINT_READING,
        "hint_tokens": OPTIONS["max_new_tokens"],
        "router": folder.router,
        "confidence": folder.provenance["cascade_threshold"],
        "donor": donors(questions),
    }
    pair = folder.fused(seed)
    return {name: make_method(name, pair, **settings) for name in METHODS}


def donors(questions: Sequence[Question]) -> Callable[[Any], Any]:
    """Returns the donor of each prompt: the next question with the same relations and no part of the answer in common.

    A question without such a donor is its own, which can happen among a few questions only.
    """
    chosen = choose_donors(questions, seed=None, accept=_is_donor)
    texts = [questions[index if donor is None else donor].text for index, donor in enumerate(chosen)]
    by_text = {question.text: text for question, text in zip(questions, texts, strict=True)}
    return lambda prompt: as_prompt(by_text[prompt[0]["content"]])


def score(
    folder: PairFolder,
    seeds: Sequence[int],
    questions: Sequence[Question],
    progress: Progress = lambda name, done: None,
) -> Run:
    """Ask every method all questions in batches, then some one at a time with the methods in turns, to time them.

    Args:
        folder: The pair.
        seeds: Fusers to score; methods without a fuser answer once.
        questions: To ask.
        progress: Called after each answer.
    """
    # 1) ask
    by_seed = [make_methods(folder, seed, questions) for seed in seeds]
    predictions: list[Prediction] = []
    for seed, methods in zip(seeds, by_seed, strict=True):
        for method in methods.values():
            if method.fuses or seed == seeds[0]:
                predictions += ask_all(method, questions, seed if method.fuses else None, progress)
    # 2) time, with the fuser of the first seed
    progress("timing", 0)
    timed = [(str(index), as_prompt(question.text), OPTIONS) for index, question in enumerate(questions)]
    timings = asking.time_methods(list(by_seed[0].values()), TASK, timed, TIMED_QUESTIONS)
    return Run(name=TASK, predictions=predictions, timings=timings)


def ask_all(
    method: Method, questions: Sequence[Question], seed: int | None = None, progress: Progress = lambda name, done: None
) -> list[Prediction]:
    """Returns a method's graded answers; ``seed`` is that of its fuser."""
    asked = [asking.Question(as_prompt(item.text), item.answer, item.kind, item.place) for item in questions]
    report = partial(progress, method.name)
    return asking.ask(method, asked, BATCH_SIZE, task=TASK, seed=seed, progress=report, **OPTIONS)


def is_right(predictions: Sequence[Prediction]) -> np.ndarray:
    """``(questions,)`` bool."""
    return np.array([row.score >= RIGHT for row in predictions])


def figures(run: Run) -> dict[str, Any]:
    """Returns all figures that the demo prints and writes."""
    task, spent = TaskScores(run.predictions), latency(run.timings)
    rates = {name: task.mean(name) for name in task.scores}  # (questions,) each
    # accuracies are averaged over seeds question by question; intervals are about other places
    known, kinds = rates[RECEIVER] > 0, sorted(set(task.categories))
    gains = {name: paired(task.gain(FUSED, over=name), task.groups) for name in rates if name != FUSED}
    return {
        "questions": len(task.items),
        "seeds": task.seeds[FUSED],
        "kept": float(rates[FUSED][known].mean()) if known.any() else None,
        "kinds": {str(kind): _means(rates, task.categories == kind) for kind in kinds},
        "methods": {name: _method(task, name, spent[name]["median"]) for name in rates},
        "gains": gains,
        "mismatched_over_receiver": paired(task.gain(MISMATCHED, over=RECEIVER), task.groups),
    }


def sample(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Returns at most ``limit`` of the questions, spread evenly over kinds and places."""
    if limit is None or limit >= len(questions):
        return list(questions)
    # every (n / limit)-th question of those sorted by kind, put back into their order
    by_kind = sorted(range(len(questions)), key=lambda i: (questions[i].kind, i))
    return [questions[i] for i in sorted(by_kind[int(step)] for step in np.linspace(0, len(questions) - 1, limit))]


def held_out(folder: PairFolder, limit: int | None = None) -> list[Question]:
    """Returns the questions about places that no fuser has seen."""
    return sample(all_questions(folder.places, "test"), limit)


def as_prompt(text: str) -> list[dict[str, str]]:
    """Returns the chat that asks a question."""
    return [{"role": "user", "content": text}]


def _means(rates: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, float]:
    return {name: float(rate[chosen].mean()) for name, rate in rates.items()}


def _method(task: TaskScores, name: str, median_seconds: float) -> dict[str, Any]:
    # the bootstrap also where each question is about another place, which reports give Wilson's interval
    accuracy, interval = bootstrap_mean(task.mean(name), task.groups)
    # as all columns but the accuracies, tokens are of the first seed
    of_first_seed = [row for row in task.rows if row.method == name and row.seed == task.seeds[name][0]]
    return {
        "accuracy": accuracy,
        "interval": interval,
        "median_seconds": median_seconds,
        "generated_tokens": fmean(row.tokens or 0 for row in of_first_seed),
    }


def _is_donor(question: Question, donor: Question) -> bool:
    # a compound answer is "capital, language"
    shared = set(question.answer.split(", ")) & set(donor.answer.split(", "))
    return donor.relations == question.relations and not shared
