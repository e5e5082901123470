"""What analyses ask of a method: how often it is right, and how likely it finds the right answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvfuse.analysis.study import Study
from kvfuse.evaluation.scoring.statistics import Interval, accuracy, bootstrap_mean
from kvfuse.methods import Method


@dataclass(frozen=True)
class Answered:
    """A method's answers to a study's questions.

    Attributes:
        replies: The answers.
        right: ``(questions,)`` bool.
        bits: ``(questions,)`` float, how unlikely the method finds the right answer, in bits per character.
        groups: ``(questions,)`` str, what is resampled as a whole.
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
        """The figures as plain JSON."""
        share, interval = self.accuracy
        bits, spread = bootstrap_mean(self.bits, self.groups)
        return {"accuracy": share, "interval": interval, "bits_per_character": bits, "bits_interval": spread}


def ask(study: Study, method: Method) -> Answered:
    """Put all questions of a study to a method, and score the right answers.

    An answer is right that says what is expected, upper and lower case and white space around it aside.

    Raises:
        AnalysisError: There are questions without an answer.
    """
    questions, options = study.with_answers().questions, {"max_new_tokens": longest_answer(study), "do_sample": False}
    method.prepare([one.prompt for one in questions], **options)
    replies, bits = [""] * len(questions), np.zeros(len(questions))
    for places in study.batches():
        prompts, targets = (
            [questions[place].prompt for place in places],
            [str(questions[place].answer) for place in places],
        )
        scores = method.score(prompts, [[target] for target in targets])
        for place, reply, target, (score,) in zip(
            places, method.reply(prompts, **options), targets, scores, strict=True
        ):
            replies[place], bits[place] = reply.text, -score.log_likelihood / (math.log(2) * len(target))
    right = np.array([_same(reply, str(one.answer)) for reply, one in zip(replies, questions, strict=True)])
    return Answered(replies, right, bits, study.groups)


def longest_answer(study: Study) -> int:
    """Tokens that the longest answer takes, to any of the models, and its end."""
    models = study.pair.receiver, *study.pair.sharers
    return 1 + max(len(model.tokenizer(str(one.answer))["input_ids"]) for model in models for one in study.questions)


def _same(reply: str, answer: str) -> bool:
    return reply.strip().casefold() == answer.strip().casefold()
