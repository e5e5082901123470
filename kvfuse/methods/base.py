"""What a method is: a name, answers to a batch of prompts with what they cost, and how likely it finds given answers."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from kvfuse.errors import MethodError
from kvfuse.language_model import LanguageModel
from kvfuse.prompts.chat import Prompt
from kvfuse.stages.phases import measured

T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """One generated text, how many tokens it took all models together, and how many they read for it."""

    text: str
    tokens: int
    tokens_in: int


@dataclass(frozen=True)
class Answer:
    """A reply and what it cost.

    Attributes:
        text: The answer.
        tokens: Generated for it, hints between models included.
        seconds: Wall time, shared evenly over its batch.
        tokens_in: Read for it, by all models together, as prompts.
        phases: Seconds by phase (:data:`kvfuse.stages.phases.PHASES`), where :meth:`Method.timed` measured them; what is missing to
            ``seconds`` is tokenization and the like.
    """

    text: str
    tokens: int
    seconds: float
    tokens_in: int = 0
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OptionScore:
    """How likely a method finds one given answer.

    Attributes:
        log_likelihood: Summed log-probability of its tokens after the prompt, in nats.
        greedy: Whether each of them is the likeliest at its place.
        tokens: How many there are.
    """

    log_likelihood: float
    greedy: bool
    tokens: int


class Method(ABC):
    """A way to answer. A subclass has a ``name`` and writes :meth:`reply`, and :meth:`score` if it can.

    Attributes:
        name: What it is called.
        fuses: Whether its answers depend on a fuser.
    """

    name: str
    fuses: bool = False

    def prepare(self, prompts: Sequence[Prompt], **options: Any) -> None:  # noqa: B027
        """Told once, before a run, all its prompts and the options that they will be answered with; most have no use for them."""

    @abstractmethod
    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """Answer a batch; ``options`` are those of transformers' ``generate``."""

    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """Score given answers.

        Args:
            prompts: A batch. All answers to it are scored in one run, so its memory grows with their number.
            options: For each prompt the texts that may follow it, as they would be written right behind it.

        Raises:
            MethodError: The method only generates.
        """
        raise MethodError(
            f"expected a method that scores options, got {self.name}, which only generates; read its answers as text"
        )

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Answer one prompt piece by piece; here, in one piece."""
        yield self.reply([prompt], **options)[0].text

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Answer]:
        """Answer a batch and time it."""
        start = time.perf_counter()
        replies = self.reply(prompts, **options)
        seconds = (time.perf_counter() - start) / max(len(prompts), 1)
        return [Answer(reply.text, reply.tokens, seconds, reply.tokens_in) for reply in replies]

    def timed(self, prompt: Prompt, **options: Any) -> Answer:
        """Answer one prompt and tell where the time went, at the price of waiting for the device after each phase."""
        with measured() as stopwatch:
            answer = self.generate([prompt], **options)[0]
        return replace(answer, phases=dict(stopwatch.seconds))


def to_replies(ids: Tensor, model: LanguageModel, tokens_in: Sequence[int]) -> list[Reply]:
    """Decode generated ids.

    Args:
        ids: ``(B, new)`` int64, without the prompt; a row is over at its first end-of-sequence token.
        model: Whose they are.
        tokens_in: How many tokens were read for each row.
    """
    eos = model.model.generation_config.eos_token_id
    stops = set(eos if isinstance(eos, list) else [eos])
    replies = []
    for row, read in zip(ids.tolist(), tokens_in, strict=True):
        length = next((place + 1 for place, token in enumerate(row) if token in stops), len(row))
        replies.append(Reply(model.tokenizer.decode(row[:length], skip_special_tokens=True).strip(), length, read))
    return replies


def by_choice(
    choices: Sequence[bool], first: Callable[[list[int]], list[T]], second: Callable[[list[int]], list[T]]
) -> list[T]:
    """Have the rows of a batch answered by the first, or where chosen by the second, and put them in order again.

    Args:
        choices: For each row whether the second answers.
        first: Answers rows by their numbers.
        second: Likewise.
    """
    answers: dict[int, T] = {}
    for wanted, answer in ((False, first), (True, second)):
        rows = [row for row, chosen in enumerate(choices) if chosen == wanted]
        if rows:
            answers.update(zip(rows, answer(rows), strict=True))
    return [answers[row] for row in range(len(choices))]
