"""A conversation with a pair: each turn reads only what is new, and goes on where the models' context ends."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from kvfuse.errors import PromptError
from kvfuse.model import CacheToCache
from kvfuse.prompts.messages import Message
from kvfuse.stages.generate_options import DEFAULT_NEW_TOKENS, require_options
from kvfuse.stages.prefix_store import PrefixStore


class Conversation:
    """Questions and answers, of which the models read those that fit into their context.

    Args:
        pair: The models and fusers; a pair without a store gets one.
        system: Instructions, which stay at the beginning.
        options: Of every answer, as those of :meth:`CacheToCache.generate`.

    Attributes:
        dropped: Number of questions at the beginning, with their answers, that are no longer read.

    Raises:
        PromptError: An option that ``generate`` does not take.
    """

    def __init__(self, pair: CacheToCache, system: str | None = None, **options: Any) -> None:
        require_options(pair.receiver.model, options)
        if pair.store is None:
            pair.store = PrefixStore()
        self.pair, self.options, self.dropped = pair, options, 0
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns: list[Message] = []

    def ask(self, question: str) -> Iterator[str]:
        """Returns the answer piece by piece; it is remembered as far as it is read.

        Raises:
            PromptError: A question that cannot be read, also not by itself; the conversation stays as it was.
        """
        turns = self._that_fit([*self._turns, {"role": "user", "content": question}])
        self.dropped += (len(self._turns) + 1 - len(turns)) // 2
        return self._answer(turns)

    def _that_fit(self, turns: list[Message]) -> list[Message]:
        """The turns without as many of the oldest questions and answers as have to go."""
        for start in range(0, len(turns) - 1, 2):
            with suppress(PromptError):
                if self._leaves_room(turns[start:]):
                    return turns[start:]
        self.pair.align([*self._system, turns[-1]])  # raises where the question by itself cannot be read
        return turns[-1:]

    def _leaves_room(self, turns: list[Message]) -> bool:
        """Whether an answer, or one of a quarter of the context, fits behind."""
        context = self.pair.receiver.context
        aligned = self.pair.align([*self._system, *turns])
        if context is None:
            return True
        room = min(self.options.get("max_new_tokens", DEFAULT_NEW_TOKENS), context // 4)
        return len(aligned.receiver.ids) + room <= context

    def _answer(self, turns: list[Message]) -> Iterator[str]:
        answer: Message = {"role": "assistant", "content": ""}
        for piece in self.pair.stream([*self._system, *turns], **self.options):
            answer["content"] += piece
            self._turns = [*turns, answer]  # not before: an answer that fails at once leaves the conversation as it was
            yield piece


def sampling(temperature: float | None = None, seed: int | None = None) -> dict[str, Any]:
    """Options of ``generate`` for a temperature; 0 is greedy, None leaves it to the receiver. Sets torch's seed.

    Raises:
        PromptError: A temperature or a seed that cannot be.
    """
    if seed is not None:
        if not 0 <= seed < 2**63:
            raise PromptError(f"expected a seed from 0 to 2^63 - 1, got {seed}; choose another")
        torch.manual_seed(seed)
    if temperature is None:
        return {}
    if not 0 <= temperature < float("inf"):
        raise PromptError(f"expected a temperature of at least 0, got {temperature}; 0 is greedy")
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
