"""Option scores: each prompt is read once, then all its options in one run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvfuse.methods.base import OptionScore
from kvfuse.prompts.alignment import AlignedPrompt, SharerPrompt
from kvfuse.prompts.response import Response, stack_responses
from kvfuse.stages.decode import score


@dataclass(frozen=True)
class OptionBatch:
    """A batch of prompts with several responses to each, one response per row.

    Attributes:
        counts: Number of responses to each prompt.
        lengths: Number of receiver tokens of each response.
        rows: ``(N,)`` int64, the prompt that each response follows.
        prompt: The prompts, repeated: ``N`` rows.
        tail: The responses (:func:`kvfuse.prompts.response.stack_responses`).
    """

    counts: list[int]
    lengths: list[int]
    rows: Tensor
    prompt: AlignedPrompt
    tail: AlignedPrompt

    @classmethod
    def of(cls, prompt: AlignedPrompt, responses: Sequence[Sequence[Response]]) -> Self:
        """Flatten the responses to each prompt of a batch; at least one prompt must have one."""
        # one row per response, behind a copy of its prompt
        counts = [len(options) for options in responses]
        flat = [response for options in responses for response in options]
        rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))  # (N,)
        repeated = _select_rows(prompt, rows)
        return cls(counts, [len(response.ids) for response in flat], rows, repeated, stack_responses(repeated, flat))

    def score(self, model: PreTrainedModel, cache: Cache | None) -> list[list[OptionScore]]:
        """Scores of the responses to each prompt.

        Args:
            model: The model that would answer.
            cache: All positions of :attr:`prompt` but the last, ``N`` rows; None for prompts of one token. Consumed.
        """
        log_likelihoods, greedy = score(model, self.prompt, self.tail, cache)  # both (N,)
        scores = map(OptionScore, log_likelihoods.tolist(), greedy.tolist(), self.lengths)
        return [[next(scores) for _ in range(count)] for count in self.counts]


def _select_rows(prompt: AlignedPrompt, rows: Tensor) -> AlignedPrompt:
    """The given rows of a batch, ``(N, T)``; a row may occur several times or not at all."""

    def select(values: Any) -> Any:
        return None if values is None else values[rows]

    sharers = tuple(
        SharerPrompt(**{name: select(values) for name, values in vars(sharer).items()}) for sharer in prompt.sharers
    )
    tensors = {name: tensor[rows] for name, tensor in vars(prompt).items() if name != "sharers"}
    return AlignedPrompt(**tensors, sharers=sharers)
