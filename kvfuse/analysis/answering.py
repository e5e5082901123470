"""How often a method answers a study's questions right, and how likely it finds the right answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvfuse.analysis.study import Question, Study
from kvfuse.evaluation.asking import answer_all
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
    questions, options = study.with_answers().questions, {"max_new_tokens": longest_answer(study), "do_sample": False}
    method.prepare([question.prompt for question in questions], **options)

    def answer(batch: Sequence[Question]) -> list[tuple[str, float]]:
        prompts, targets = [question.prompt for question in batch], [str(question.answer) for question in batch]
        scores = method.score(prompts, [[target] for target in targets])
        nats = [-score.log_likelihood / len(target) for (score,), target in zip(scores, targets, strict=True)]
        return [(reply.text, nat) for reply, nat in zip(method.reply(prompts, **options), nats, strict=True)]

    answers = answer_all(questions, answer, study.batch_size, length=lambda question: len(str(question.prompt)))
    replies = [reply for reply, _ in answers]
    right = [same_answer(reply, str(question.answer)) for reply, question in zip(replies, questions, strict=True)]
    bits = np.array([nats for _, nats in answers]) / math.log(2)  # (questions,)
    return Answered(replies, np.array(right), bits, study.groups)


def longest_answer(study: Study) -> int:
    """Returns the number of tokens of the longest answer, to any of the models, plus one for its end."""
    models = study.pair.receiver, *study.pair.sharers
    return 1 + max(len(model.tokenizer(str(one.answer))["input_ids"]) for model in models for one in study.questions)
