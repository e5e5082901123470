"""The contract of a method: reply to a batch of prompts, and score given answers."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from kvfuse.errors import MethodError
from kvfuse.language_model import LanguageModel
from kvfuse.prompts.alignment import AlignedPrompt
from kvfuse.prompts.ends import end_ids
from kvfuse.prompts.messages import Prompt
from kvfuse.stages.phases import measured

T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """A generated text and its cost.

    Attributes:
        text: The answer.
        tokens: Number of tokens that all models together generated for it, hints between models included.
        tokens_in: Number of prompt tokens that all models together read for it.
    """

    text: str
    tokens: int
    tokens_in: int

    def plus(self, *, tokens: int, tokens_in: int) -> Self:
        """The same text at a higher cost."""
        return replace(self, tokens=self.tokens + tokens, tokens_in=self.tokens_in + tokens_in)


@dataclass(frozen=True)
class Answer(Reply):
    """A reply with the time it took.

    Attributes:
        seconds: Wall time of the batch, divided by its size.
        phases: Seconds by phase (:data:`kvfuse.stages.phases.PHASES`), measured by :meth:`Method.timed` only. They add
            up to less than ``seconds``: tokenization and the like belong to no phase.
    """

    seconds: float
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OptionScore:
    """The likelihood of one given answer.

    Attributes:
        log_likelihood: Summed log-probability of its tokens after the prompt, in nats.
        greedy: Whether each of its tokens is the most likely one at its position.
        tokens: Number of its tokens.
    """

    log_likelihood: float
    greedy: bool
    tokens: int


class Method(ABC):
    """A way to answer. A subclass sets ``name`` and writes :meth:`reply`, and :meth:`score` if it can.

    Attributes:
        name: Name in recipes and reports.
        fuses: Whether the answers depend on a fuser.
    """

    name: str
    fuses: bool = False

    def prepare(self, prompts: Sequence[Prompt], **options: Any) -> None:  # noqa: B027
        """Called once before a run with all its prompts and the options of :meth:`reply`; default: no-op."""

    @abstractmethod
    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """Answer a batch; ``options`` are those of transformers' ``generate``."""

    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """Score given answers.

        Args:
            prompts: A batch. All options of all prompts are scored in one run, so memory grows with their number.
            options: For each prompt the texts that may follow it, written as they would directly follow it.

        Raises:
            MethodError: The method only generates.
        """
        raise MethodError(
            f"expected a method that scores options, got {self.name}, which only generates; read its answers as text"
        )

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Answer one prompt piece by piece; default: in one piece."""
        yield self.reply([prompt], **options)[0].text

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Answer]:
        """Answer a batch and time it."""
        start = time.perf_counter()
        replies = self.reply(prompts, **options)
        seconds = (time.perf_counter() - start) / max(len(prompts), 1)  # a batch is timed as a whole
        return [Answer(reply.text, reply.tokens, reply.tokens_in, seconds) for reply in replies]

    def timed(self, prompt: Prompt, **options: Any) -> Answer:
        """Answer one prompt with seconds by phase; slower, because it waits for the device after each phase."""
        with measured() as stopwatch:
            answer = self.generate([prompt], **options)[0]
        return replace(answer, phases=dict(stopwatch.seconds))


def to_replies(ids: Tensor, prompt: AlignedPrompt, model: LanguageModel) -> list[Reply]:
    """Decode generated ids.

    Args:
        ids: ``(B, T + new)`` int64, what ``generate`` returned; a row ends at the first token that ends a response.
        prompt: What all models read, the generating model's ids ``(B, T)``.
        model: The model that generated them.
    """
    stops = end_ids(model.tokenizer, model.model.generation_config)
    masks = [prompt.mask, *(sharer.mask for sharer in prompt.sharers)]
    tokens_in = torch.stack([mask.sum(1) for mask in masks]).sum(0)  # (B,)
    replies = []
    for row, read in zip(ids[:, prompt.ids.shape[1] :].tolist(), tokens_in.tolist(), strict=True):
        # the token that ends a response counts as generated, the padding after it does not
        length = next((index + 1 for index, token in enumerate(row) if token in stops), len(row))
        replies.append(Reply(model.tokenizer.decode(row[:length], skip_special_tokens=True).strip(), length, read))
    return replies


def by_choice(
    choices: Sequence[bool], *columns: Sequence[Any], if_false: Callable[..., list[T]], if_true: Callable[..., list[T]]
) -> list[T]:
    """Split a batch by a choice per row, answer both parts, and put the answers back in the order of the rows.

    Args:
        choices: One per row.
        columns: The arguments of both functions, each with one entry per row.
        if_false: Answers the rows whose choice is false.
        if_true: Answers the other rows.
    """
    answers: dict[int, T] = {}
    for choice, answer in ((False, if_false), (True, if_true)):
        rows = [row for row, chosen in enumerate(choices) if chosen == choice]
        if rows:
            # each function sees one smaller batch, and none that is empty
            answers.update(zip(rows, answer(*([column[row] for row in rows] for column in columns)), strict=True))
    return [answers[row] for row in range(len(choices))]
