"""Option scores: each prompt is read once, then all that may follow it in one run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvfuse.methods.base import OptionScore
from kvfuse.prompts.alignment import AlignedPrompt
from kvfuse.prompts.response import Response, stack_responses
from kvfuse.stages.decode import score


@dataclass(frozen=True)
class OptionBatch:
    """Several responses to each prompt of a batch, one a row.

    Attributes:
        counts: How many there are to each prompt.
        lengths: How many of the receiver's tokens each has.
        rows: ``(N,)`` int64, which prompt each follows.
        prompt: Their prompts, repeated.
        tail: The responses (:func:`kvfuse.prompts.response.stack_responses`).
    """

    counts: list[int]
    lengths: list[int]
    rows: Tensor
    prompt: AlignedPrompt
    tail: AlignedPrompt

    @classmethod
    def of(cls, prompt: AlignedPrompt, responses: Sequence[Sequence[Response]]) -> Self:
        """For each prompt of a batch its responses; one of them at least has one."""
        counts, flat = [len(some) for some in responses], [response for some in responses for response in some]
        rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        repeated = _select(prompt, rows)
        return cls(counts, [len(response.ids) for response in flat], rows, repeated, stack_responses(repeated, flat))

    def score(self, model: PreTrainedModel, cache: Cache | None) -> list[list[OptionScore]]:
        """Score them by the model that would answer.

        Args:
            model: The model.
            cache: All prompt positions but the last, of :attr:`prompt`; None for prompts of one token. It is used up.
        """
        likely, greedy = score(model, self.prompt, self.tail, cache)
        scores = map(OptionScore, likely.tolist(), greedy.tolist(), self.lengths)
        return [[next(scores) for _ in range(count)] for count in self.counts]


def _select(prompt: AlignedPrompt, rows: Tensor) -> AlignedPrompt:
    """Rows of a batch, repeated or left out."""
    sharers = tuple(
        replace(one, ids=one.ids[rows], mask=one.mask[rows], positions=one.positions[rows]) for one in prompt.sharers
    )
    sharers = tuple(replace(one, index=one.index[rows]) for one in sharers)
    mine = {name: getattr(prompt, name)[rows] for name in ("ids", "mask", "positions", "fuse_mask")}
    return replace(prompt, **mine, sharers=sharers)
