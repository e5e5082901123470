"""Every method on the embedded pair's held-out questions: who is right, how often, how fast."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from kvfuse.demo.lessons import HINT_READING, HINT_REQUEST
from kvfuse.demo.pair_folder import PairFolder
from kvfuse.demo.questions import Question, all_questions
from kvfuse.evaluation.scoring.statistics import Interval, bootstrap_mean
from kvfuse.methods import Answer, Fused, Method, make_method

METHODS = ("receiver", "sharer", "text-to-text", "routing", "cascade", "cache-to-cache", "zeroed", "mismatched")
BATCH = 64
TIMED_QUESTIONS = 60
OPTIONS = {"max_new_tokens": 24, "do_sample": False}


@dataclass(frozen=True)
class Scores:
    """What one method answered.

    Attributes:
        right: ``(seeds, questions)`` bool; a method without a fuser has one row.
        answers: The answers of the first seed, question by question.
        seconds: Of single questions, asked one at a time.
    """

    right: np.ndarray
    answers: list[Answer]
    seconds: list[float]

    @property
    def per_question(self) -> np.ndarray:
        """``(questions,)``: share of the seeds that are right."""
        return self.right.mean(axis=0)


def make_methods(folder: PairFolder, seed: int, questions: Sequence[Question]) -> dict[str, Method]:
    """Every method by name, those with a fuser for one training seed."""
    options = {
        "hint_request": HINT_REQUEST,
        "hint_reading": HINT_READING,
        "hint_tokens": OPTIONS["max_new_tokens"],
        "router": folder.router,
        "confidence": folder.provenance["cascade_threshold"],
        "donor": donors(questions),
    }
    pair = folder.fused(seed)
    return {name: make_method(name, pair, **options) for name in METHODS}


def donors(questions: Sequence[Question]) -> Callable[[Any], Any]:
    """For each question another one of the same relations about another place, with no part of the answer in common."""
    chosen = {}
    for i, question in enumerate(questions):
        others = [*questions[i + 1 :], *questions[:i]]
        chosen[question.text] = next(
            (other.text for other in others if other.relations == question.relations and not _share(other, question)),
            question.text,
        )
    return lambda prompt: as_prompt(chosen[prompt[0]["content"]])


def score(
    folder: PairFolder,
    seeds: Sequence[int],
    questions: Sequence[Question],
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> dict[str, Scores]:
    """Ask every method everything in batches, then some questions one at a time, methods interleaved, for the clock.

    Args:
        folder: The pair.
        seeds: Fusers to score; methods without a fuser answer once.
        questions: What to ask.
        progress: Told a method's name and how many questions it has just answered.
    """
    answers: dict[str, list[list[Answer]]] = {}
    by_seed = [make_methods(folder, seed, questions) for seed in seeds]
    for methods in by_seed:
        for name, method in methods.items():
            if name not in answers or isinstance(method, Fused):
                answers.setdefault(name, []).append(ask_all(method, questions, progress))
    progress("timing", 0)
    seconds = time_methods(by_seed[0], questions)
    return {
        name: Scores(np.array([is_right(run, questions) for run in runs]), runs[0], seconds[name])
        for name, runs in answers.items()
    }


def ask_all(
    method: Method, questions: Sequence[Question], progress: Callable[[str, int], None] = lambda name, done: None
) -> list[Answer]:
    """Answer in batches of like length, so that little is padding; ``progress`` as in :func:`score`."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].text))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        answers.update(zip(rows, method.generate([as_prompt(questions[i].text) for i in rows], **OPTIONS), strict=True))
        progress(method.name, len(rows))
    return [answers[i] for i in range(len(questions))]


def is_right(answers: Sequence[Answer], questions: Sequence[Question]) -> np.ndarray:
    """``(questions,)`` bool."""
    return np.array([answer.text == question.answer for answer, question in zip(answers, questions, strict=True)])


def time_methods(methods: dict[str, Method], questions: Sequence[Question]) -> dict[str, list[float]]:
    """Seconds of single questions, spread evenly over ``questions``; methods take turns, so that drift hits all alike."""
    asked = [questions[i] for i in np.linspace(0, len(questions) - 1, min(TIMED_QUESTIONS, len(questions))).astype(int)]
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for question in [asked[0], *asked]:  # the first is a warm-up
        for name, method in methods.items():
            seconds[name].append(method.generate([as_prompt(question.text)], **OPTIONS)[0].seconds)
    return {name: taken[1:] for name, taken in seconds.items()}


def figures(scores: dict[str, Scores], questions: Sequence[Question], seeds: Sequence[int]) -> dict[str, Any]:
    """All figures as the demo prints and writes them."""
    places = [question.place for question in questions]
    kinds = sorted({question.kind for question in questions})
    of_kind = {kind: np.array([question.kind == kind for question in questions]) for kind in kinds}
    knew = scores["receiver"].per_question > 0
    fused = scores["cache-to-cache"].per_question
    return {
        "questions": len(questions),
        "seeds": list(seeds),
        "kept": float(fused[knew].mean()) if knew.any() else None,
        "kinds": {
            kind: {name: float(one.per_question[of_kind[kind]].mean()) for name, one in scores.items()}
            for kind in kinds
        },
        "methods": {name: _method_figures(one, places) for name, one in scores.items()},
        "gains": {
            name: _gain(fused - one.per_question, places) for name, one in scores.items() if name != "cache-to-cache"
        },
        "mismatched_over_receiver": _gain(scores["mismatched"].per_question - scores["receiver"].per_question, places),
    }


def sample(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """So many of the questions, spread evenly over kinds and places."""
    if limit is None or limit >= len(questions):
        return list(questions)
    by_kind = sorted(range(len(questions)), key=lambda i: (questions[i].kind, i))
    return [questions[i] for i in sorted(by_kind[int(place)] for place in np.linspace(0, len(questions) - 1, limit))]


def held_out(folder: PairFolder, limit: int | None = None) -> list[Question]:
    """The questions about places that no fuser has seen."""
    return sample(all_questions(folder.places, "test"), limit)


def as_prompt(text: str) -> list[dict[str, str]]:
    """The chat that asks it."""
    return [{"role": "user", "content": text}]


def _method_figures(one: Scores, places: Sequence[str]) -> dict[str, Any]:
    accuracy, interval = bootstrap_mean(one.per_question, places)
    tokens = fmean(answer.tokens for answer in one.answers)
    return {
        "accuracy": accuracy,
        "interval": interval,
        "median_seconds": median(one.seconds),
        "generated_tokens": tokens,
    }


def _gain(difference: np.ndarray, places: Sequence[str]) -> dict[str, float | Interval]:
    mean, interval = bootstrap_mean(difference, places)
    return {"difference": mean, "interval": interval}


def _share(one: Question, other: Question) -> bool:
    return bool(set(one.answer.split(", ")) & set(other.answer.split(", ")))
