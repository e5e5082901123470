"""The subject of an analysis: a pair, and the questions that it reads or answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from kvfuse.demo.pair_folder import PairFolder
from kvfuse.demo.questions import all_questions
from kvfuse.demo.score import held_out, sample
from kvfuse.errors import AnalysisError
from kvfuse.model import CacheToCache
from kvfuse.prompts.messages import Prompt, as_chat
from kvfuse.support.rows import decode
from kvfuse.testing import tiny_fuser, tiny_model, tiny_tokenizer
from kvfuse.training.data.examples import examples_of
from kvfuse.training.data.sources import load_rows, parse
from kvfuse.training.recipe import load_data

DEFAULT_QUESTIONS = 240
"""Questions about the embedded pair where the command names no limit: enough to see an effect, within a minute."""
NUM_LESSONS = 2560
TINY_QUESTIONS = (
    ("What is the capital of Norway?", "Oslo", "capital"),
    ("Which language do people speak in Rotterdam?", "Dutch", "language"),
    ("Two models read the same question. Which language do they speak there?", "English", "language"),
    ("What is the capital of the question?", "answer", "capital"),
)


@dataclass(frozen=True)
class Question:
    """A question with its right answer.

    Attributes:
        prompt: A text or a chat.
        answer: The right answer, if known.
        category: Its subject or kind.
        group: Its topic, where questions are not independent of each other.
    """

    prompt: Prompt
    answer: str | None = None
    category: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Study:
    """A pair with questions.

    Attributes:
        pair: The models and fusers.
        questions: To read or to answer.
        smoke: Do less of everything, to see that it runs.
        lessons: Similar questions to train on, if there are any.
        seed: Of random draws.
        batch_size: Questions read at once.
    """

    pair: CacheToCache
    questions: Sequence[Question]
    smoke: bool = False
    lessons: Sequence[Question] = ()
    seed: int = 0
    batch_size: int = 32

    @classmethod
    def embedded(cls, limit: int | None = None, smoke: bool = False) -> Self:
        """Returns the embedded pair with its held-out questions, or ``limit`` of them, evenly over kinds and places."""
        folder = PairFolder()
        # lessons are about other places than the questions
        lessons = sample(all_questions(folder.places, "train"), NUM_LESSONS)
        asked, learnt = (
            [Question(as_chat(item.text), item.answer, item.kind, item.place) for item in items]
            for items in (held_out(folder, limit), lessons)
        )
        return cls(folder.fused(0), asked, smoke, learnt)

    @classmethod
    def tiny(cls, family: str = "qwen3") -> Self:
        """Returns random models for smoke runs: a receiver of any of :data:`kvfuse.testing.FAMILIES`."""
        receiver = tiny_model(family)
        # another family and tokenizer than the receiver's
        sharer_family = "qwen3" if family == "llama" else "llama"
        sharer = tiny_model(sharer_family, tiny_tokenizer(300, "lines"), seed=1, num_hidden_layers=4)
        pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])
        questions = [Question(as_chat(text), answer, category) for text, answer, category in TINY_QUESTIONS]
        return cls(pair, questions, smoke=True, lessons=questions)

    def with_answers(self) -> Self:
        """Returns the study itself. Raises AnalysisError where a question has no answer."""
        if missing := sum(not question.answer for question in self.questions):
            raise AnalysisError(f"expected questions with answers, got {missing} without; use data with responses")
        return self

    def spread(self, count: int) -> Self:
        """Returns the same study with at most ``count`` questions, spread evenly over all categories."""
        # categories one after the other, then every so many
        questions = sorted(self.questions, key=lambda question: question.category or "")
        chosen = np.linspace(0, len(questions) - 1, min(count, len(questions))).astype(int)
        return replace(self, questions=[questions[index] for index in chosen])

    def batches(self) -> Iterator[list[int]]:
        """Yields the indices of questions to read at once: of similar length, so that there is little padding."""
        # long prompts with long ones
        order = sorted(range(len(self.questions)), key=lambda index: len(str(self.questions[index].prompt)))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    @property
    def groups(self) -> np.ndarray:
        """``(questions,)`` str: the unit of resampling; a question without a group is its own."""
        return np.array([question.group or f"question {index}" for index, question in enumerate(self.questions)])


def choose(
    fuser: Sequence[str] = (),
    data: str | None = None,
    receiver: str | None = None,
    sharer: Sequence[str] = (),
    limit: int | None = None,
    smoke: bool = False,
    **model_options: Any,
) -> Study:
    """Returns a command's study: the user's own pair and data, tiny models for a smoke run, else the embedded pair.

    Args:
        fuser: Folder or Hub id, one per sharer.
        data: A file, a folder or a Hub data set, in any form that training reads; the ``category`` or ``subject`` of a
            row is the question's category.
        receiver: By default the one that the fuser names.
        sharer: By default those that the fusers name.
        limit: Number of questions.
        smoke: See :class:`Study`.
        model_options: For the user's own pair, as in :meth:`CacheToCache.from_pretrained`.

    Raises:
        AnalysisError: A fuser without data, data or models without a fuser, or no question in the data.
    """
    if fuser and data:
        questions = _read_questions(data, limit)
        pair = CacheToCache.from_pretrained(receiver, list(sharer) or None, list(fuser), **model_options)
        return Study(pair, questions, smoke)
    if fuser or data or receiver or sharer:
        raise AnalysisError(
            "expected both --fuser and --data for a pair of your own, got one without the other; name both or neither"
        )
    return Study.tiny() if smoke else Study.embedded(limit or DEFAULT_QUESTIONS)


def _read_questions(source: str, limit: int | None) -> list[Question]:
    data = load_data(source, [] if limit is None else [f"limit={max(limit, 2)}"])
    # as training reads them: a row may hold several examples, and invalid rows are skipped
    questions: list[Question] = []
    for number, row in enumerate(load_rows(data)):
        try:
            name, _, content = parse(row, number, data)
            content = decode(name, content)
            examples = examples_of(content, data)
        except ValueError:  # an invalid row
            continue
        category = content.get("category") or content.get("subject")
        questions += [Question(example.prompt, example.response, category) for example in examples]
    if not questions:
        raise AnalysisError(f"expected prompts with responses in {source}, got none; check the data")
    return questions[:limit]
