"""What a method is: a name, and answers to a batch of prompts with what they cost."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvfuse.chat import Prompt
from kvfuse.language_model import LanguageModel


@dataclass(frozen=True)
class Reply:
    """One generated text and how many tokens it took all models together."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Answer:
    """A reply and what it cost.

    Attributes:
        text: The answer.
        tokens: Generated for it, hints between models included.
        seconds: Wall time, shared evenly over its batch.
    """

    text: str
    tokens: int
    seconds: float


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
    """A way to answer. A subclass has a ``name`` and writes :meth:`reply`."""

    name: str

    def prepare(self, prompts: Sequence[Prompt], **options: Any) -> None:  # noqa: B027  optional
        """Told once, before a run, all its prompts and the options that they will be answered with; most have no use for them."""

    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """Score given answers: for each prompt the texts that may follow it, as they would be written right behind it."""
        raise NotImplementedError

    @abstractmethod
    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """Answer a batch; ``options`` are those of transformers' ``generate``."""

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Answer]:
        """Answer a batch and time it."""
        start = time.perf_counter()
        replies = self.reply(prompts, **options)
        seconds = (time.perf_counter() - start) / max(len(prompts), 1)
        return [Answer(reply.text, reply.tokens, seconds) for reply in replies]


def to_replies(ids: Tensor, model: LanguageModel) -> list[Reply]:
    """Decode generated ids.

    Args:
        ids: ``(B, new)`` int64, without the prompt; a row is over at its first end-of-sequence token.
        model: Whose they are.
    """
    eos = model.model.generation_config.eos_token_id
    stops = set(eos if isinstance(eos, list) else [eos])
    replies = []
    for row in ids.tolist():
        length = next((place + 1 for place, token in enumerate(row) if token in stops), len(row))
        replies.append(Reply(model.tokenizer.decode(row[:length], skip_special_tokens=True).strip(), length))
    return replies
