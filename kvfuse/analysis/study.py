"""What is looked at: a pair, and questions to put to it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from kvfuse.demo.pair_folder import PairFolder
from kvfuse.demo.questions import all_questions
from kvfuse.demo.score import held_out, sample
from kvfuse.errors import AnalysisError
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt, stack
from kvfuse.prompts.chat import Prompt, as_chat
from kvfuse.support.rows import decode
from kvfuse.testing import tiny_fuser, tiny_model, tiny_tokenizer
from kvfuse.training.data.examples import examples_of
from kvfuse.training.data.sources import load_rows, parse
from kvfuse.training.recipe import load_data

FEW = 240
"""Of the embedded pair's questions, where a command is not told how many: enough to see, within a minute."""
LESSONS = 2560
TINY_QUESTIONS = (
    ("What is the capital of Norway?", "Oslo", "capital"),
    ("Which language do people speak in Rotterdam?", "Dutch", "language"),
    ("Two models read the same question. Which language do they speak there?", "English", "language"),
    ("What is the capital of the question?", "answer", "capital"),
)


@dataclass(frozen=True)
class Question:
    """One thing to ask.

    Attributes:
        prompt: As the models are given it.
        answer: What is right, where that is known.
        category: Its subject or kind.
        group: What it is about, where questions are not independent.
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
        questions: What to ask, or to read.
        lessons: Others like them to train on, where there are some.
        smoke: Fewer of everything: only whether it runs.
        seed: Of what is drawn.
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
        """The embedded pair with its held-out questions, or so many of them, spread evenly over kinds and places."""
        folder = PairFolder()
        lessons = sample(all_questions(folder.places, "train"), LESSONS)
        asked, learnt = (
            [Question(as_chat(one.text), one.answer, one.kind, one.place) for one in some]
            for some in (held_out(folder, limit), lessons)
        )
        return cls(folder.fused(0), asked, smoke, learnt)

    @classmethod
    def tiny(cls, family: str = "qwen3") -> Self:
        """Random models for smoke runs: a receiver of a family of :data:`kvfuse.testing.FAMILIES`, and a sharer of another."""
        receiver = tiny_model(family)
        sharer = tiny_model(
            "qwen3" if family == "llama" else "llama", tiny_tokenizer(300, "lines"), seed=1, num_hidden_layers=4
        )
        pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])
        questions = [Question(as_chat(text), answer, kind) for text, answer, kind in TINY_QUESTIONS]
        return cls(pair, questions, smoke=True, lessons=questions)

    @classmethod
    def load(
        cls,
        fuser: str | Path | Sequence[str | Path],
        data: str | Path,
        receiver: str | Path | None = None,
        sharer: str | Path | Sequence[str | Path] | None = None,
        limit: int | None = None,
        smoke: bool = False,
        **options: Any,
    ) -> Self:
        """A pair of the user's own, with questions from any data that training reads.

        Args:
            fuser: Folder or Hub id, one per sharer.
            data: A file, a folder or a Hub data set; what a ``category`` or ``subject`` of a row says is the question's category.
            receiver: By default the one that the fuser names.
            sharer: Likewise, or one per fuser.
            limit: Read the first so many rows.
            smoke: See :class:`Study`.
            options: For the models, as of :meth:`kvfuse.model.CacheToCache.from_pretrained`.

        Raises:
            AnalysisError: There is no question in the data.
        """
        questions = _read_questions(str(data), limit)
        return cls(CacheToCache.from_pretrained(receiver, sharer, fuser, **options), questions, smoke)

    def with_answers(self) -> Self:
        """The same study. Raises AnalysisError where not every question has an answer."""
        if missing := sum(not one.answer for one in self.questions):
            raise AnalysisError(f"expected questions with answers, got {missing} without; use data with responses")
        return self

    def batches(self) -> Iterator[list[int]]:
        """Places of questions that are read at once, of like length, so that little is padding; each place once."""
        order = sorted(range(len(self.questions)), key=lambda place: len(str(self.questions[place].prompt)))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def prompts(self) -> Iterator[AlignedPrompt]:
        """The same batches, as every model reads them."""
        for places in self.batches():
            yield stack([self.pair.align(self.questions[place].prompt) for place in places])

    @property
    def groups(self) -> np.ndarray:
        """``(questions,)`` str: what is resampled as a whole; a question without a group is one of its own."""
        return np.array([one.group or f"question {place}" for place, one in enumerate(self.questions)])


def choose(
    fuser: Sequence[str] = (),
    data: str | None = None,
    receiver: str | None = None,
    sharer: Sequence[str] = (),
    limit: int | None = None,
    smoke: bool = False,
) -> Study:
    """What a command looks at: the user's own pair and data, tiny models for a smoke run, else the embedded pair.

    Raises:
        AnalysisError: A fuser without data, or data or models without a fuser.
    """
    if fuser and data:
        return Study.load(list(fuser), data, receiver, list(sharer) or None, limit, smoke, device_map="auto")
    if fuser or data or receiver or sharer:
        raise AnalysisError(
            "expected both --fuser and --data for a pair of your own, got one without the other; name both or neither"
        )
    return Study.tiny() if smoke else Study.embedded(limit or FEW)


def _read_questions(source: str, limit: int | None) -> list[Question]:
    data = load_data(source, [] if limit is None else [f"limit={max(limit, 2)}"])
    questions: list[Question] = []
    for number, row in enumerate(load_rows(data)):
        try:
            name, _, content = parse(row, number, data)
            content = decode(name, content)
            category = content.get("category") or content.get("subject")
            questions += [Question(one.prompt, one.response, category) for one in examples_of(content, data)]
        except ValueError:
            continue
    if not questions:
        raise AnalysisError(f"expected prompts with responses in {source}, got none; check the data")
    return questions[:limit]
