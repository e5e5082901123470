"""How often a method answers a study's questions right, and how likely it finds the right answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvfuse.analysis.study import Study
from kvfuse.evaluation.asking import answer_all, prompt_lengths
from kvfuse.evaluation.scoring.results import same_answer
from kvfuse.evaluation.scoring.statistics import Interval, accuracy, bootstrap_mean
from kvfuse.methods import Method


@dataclass(frozen=True)
class Answered:
    """A method's answers to a study's questions.

    Attributes:
        replies: The answers.
        right: ``(questions,)`` bool.
        bits: ``(questions,)`` float, the surprise at the right answer in bits per character.
        groups: ``(questions,)`` str, topics that are resampled as a whole.
    """

    replies: Sequence[str]
    right: np.ndarray
    bits: np.ndarray
    groups: np.ndarray

    @property
    def accuracy(self) -> tuple[float, Interval]:
        """Share of right answers with its 95% interval."""
        return accuracy(self.right.astype(float), self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as plain JSON."""
        share, interval = self.accuracy
        bits, bits_interval = bootstrap_mean(self.bits, self.groups)
        return {"accuracy": share, "interval": interval, "bits_per_character": bits, "bits_interval": bits_interval}


def ask(study: Study, method: Method) -> Answered:
    """Have a method answer all questions of a study, and score the right answers.

    Raises:
        AnalysisError: There are questions without an answer.
    """
    questions = study.with_answers().questions
    prompts, targets = [question.prompt for question in questions], [str(question.answer) for question in questions]
    options = {"max_new_tokens": longest_answer(study), "do_sample": False}
    method.prepare(prompts, **options)

    def answer(indices: list[int]) -> list[tuple[str, float]]:
        batch = [prompts[index] for index in indices]
        scores = method.score(batch, [[targets[index]] for index in indices])
        replies = method.reply(batch, **options)
        return [(reply.text, -score.log_likelihood) for reply, (score,) in zip(replies, scores, strict=True)]

    # each batch is answered and scored, then everything is put back into the order of the questions
    answers = answer_all(prompt_lengths(prompts), answer, study.batch_size)
    replies, nats = [reply for reply, _ in answers], np.array([nats for _, nats in answers])
    right = np.array([same_answer(reply, target) for reply, target in zip(replies, targets, strict=True)])
    bits = nats / math.log(2) / np.array(list(map(len, targets)))  # (questions,), per character
    return Answered(replies, right, bits, study.groups)


def longest_answer(study: Study) -> int:
    """Returns the number of tokens of the longest answer, to any of the models, plus one for its end."""
    models = study.pair.receiver, *study.pair.sharers
    answers = [str(question.answer) for question in study.questions]
    return 1 + max(len(model.tokenizer(answer)["input_ids"]) for model in models for answer in answers)
