"""What a fuser is worth on held-out responses: against the receiver alone, and against a sharer that read something else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn

from kvfuse.errors import RecipeError
from kvfuse.methods.controls import swap_sharers
from kvfuse.model import CacheToCache
from kvfuse.support.processes import processes
from kvfuse.training.data.columns import EncodedExample
from kvfuse.training.loop.batches import collate
from kvfuse.training.loop.loss import response_loss

BATCH = 16


@dataclass(frozen=True)
class Gain:
    """Bits per character of held-out responses.

    Attributes:
        receiver: Of the receiver alone.
        fused: Fused.
        mismatched: Fused, where the sharers have read another example: what is gained even so is no communication.
        examples: How many there are.
    """

    receiver: float
    fused: float
    mismatched: float
    examples: int

    def __str__(self) -> str:
        verdict = "beats the receiver alone" if self.fused < self.receiver else "does NOT beat the receiver alone"
        return (
            f"Held-out responses ({self.examples}): {self.receiver:.3f} bits per character for the receiver alone, {self.fused:.3f} fused "
            f"({self.fused / self.receiver - 1:+.1%}), {self.mismatched:.3f} with a sharer that read another example "
            f"({self.mismatched / self.receiver - 1:+.1%}). The fused receiver {verdict}."
        )

    def table(self) -> str:
        """The figures as a Markdown table."""
        rows = [
            ("receiver alone", self.receiver),
            ("fused", self.fused),
            ("fused, the sharer having read another example", self.mismatched),
        ]
        head = [
            f"| {self.examples} held-out responses | bits per character | against the receiver |",
            "| --- | ---: | ---: |",
        ]
        return "\n".join(
            [*head, *(f"| {name} | {bits:.3f} | {bits / self.receiver - 1:+.1%} |" for name, bits in rows)]
        )


class Validation:
    """Held-out examples, and the receiver's own loss on them, which no training changes.

    Several processes share the examples and add up what they measured, so that all of them get the same figures, to the bit, and
    agree on which checkpoint is the best and when to end.

    Args:
        pair: The models and the fuser.
        examples: At least one; with one alone, there is no other to mismatch it with.
        characters: The length of each response.
    """

    def __init__(self, pair: CacheToCache, examples: Sequence[EncodedExample], characters: Sequence[int]) -> None:
        self.pair, self.examples = pair, list(examples)
        self.mismatched = [mismatch(example, self.examples[place - 1]) for place, example in enumerate(self.examples)]
        self.characters = sum(characters)
        self.receiver = self._bits(self.examples, [])

    def measure(self) -> Gain:
        """Measure the fuser as it is.

        Raises:
            RecipeError: Its loss is no number.
        """
        training = self.pair.fusers[0].training
        self.pair.fusers[0].eval()
        fused, mismatched = (self._bits(examples, None) for examples in (self.examples, self.mismatched))
        self.pair.fusers[0].train(training)
        if not math.isfinite(fused):
            raise RecipeError(f"expected a finite loss, got {fused}; train with a lower train.learning_rate")
        return Gain(self.receiver, fused, mismatched, len(self.examples))

    @torch.no_grad()
    def _bits(self, examples: Sequence[EncodedExample], fusers: Sequence[nn.Module] | None) -> float:
        """Per character, over all responses; ``fusers`` as in :func:`kvfuse.training.loop.loss.response_loss`."""
        group = processes()
        mine, nats = examples[group.process_index :: group.num_processes], 0.0
        for start in range(0, math.ceil(len(examples) / group.num_processes), BATCH):
            batch = mine[
                start : start + BATCH
            ]  # none left: one is read along, for all gather a fuser that is spread over them
            loss = response_loss(self.pair, collate(batch or examples[:1]), fusers, num_items=1)
            nats += float(loss) if batch else 0.0
        return sum(gather_object([nats])) / math.log(2) / self.characters


def mismatch(example: EncodedExample, other: EncodedExample) -> EncodedExample:
    """An example whose sharers have read another's prompt and, where it is fused too, its response."""
    seen = np.arange(1 + len(example.response_ids))
    sharers = tuple((ids, index[np.minimum(seen, len(index) - 1)]) for ids, index in other.sharers)
    return replace(example, prompt=swap_sharers(example.prompt, donor=other.prompt), sharers=sharers)
