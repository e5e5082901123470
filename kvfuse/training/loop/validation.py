"""Held-out loss: the receiver alone, fused, and fused with a mismatched sharer."""

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
from kvfuse.prompts.response import Response
from kvfuse.support.processes import processes
from kvfuse.training.data.columns import EncodedExample
from kvfuse.training.loop.batches import collate
from kvfuse.training.loop.loss import response_loss

EXAMPLES_PER_BATCH = 16


@dataclass(frozen=True)
class Gain:
    """Bits per character of held-out responses.

    Attributes:
        receiver: Of the receiver alone.
        fused: Fused.
        mismatched: Fused with sharers that read another example: a gain that remains is not communication.
        examples: Number of responses.
    """

    receiver: float
    fused: float
    mismatched: float
    examples: int

    def __str__(self) -> str:
        verdict = "beats the receiver alone" if self.fused < self.receiver else "does NOT beat the receiver alone"
        return (
            f"Held-out responses ({self.examples}): {self.receiver:.3f} bits per character for the receiver alone, "
            f"{self.fused:.3f} fused ({self.fused / self.receiver - 1:+.1%}), {self.mismatched:.3f} with a sharer that "
            f"read another example ({self.mismatched / self.receiver - 1:+.1%}). The fused receiver {verdict}."
        )

    def table(self) -> str:
        """The figures as a Markdown table."""
        rows = {
            "receiver alone": self.receiver,
            "fused": self.fused,
            "fused, the sharer having read another example": self.mismatched,
        }
        return "\n".join(
            [
                f"| {self.examples} held-out responses | bits per character | against the receiver |",
                "| --- | ---: | ---: |",
                *(f"| {name} | {bits:.3f} | {bits / self.receiver - 1:+.1%} |" for name, bits in rows.items()),
            ]
        )


class Validation:
    """Held-out examples, with the receiver's own loss on them, which training does not change.

    Several processes share the examples and add up their losses. All get the same figures, to the bit, and so agree on
    the best checkpoint and on when to stop.

    Args:
        pair: The models and the fuser.
        examples: At least one; a single one is its own mismatch.
        characters: Length of each response.
    """

    def __init__(self, pair: CacheToCache, examples: Sequence[EncodedExample], characters: Sequence[int]) -> None:
        self.pair, self.examples = pair, list(examples)
        self.mismatched = [mismatch(example, self.examples[index - 1]) for index, example in enumerate(self.examples)]
        self.characters = sum(characters)
        self.receiver = self._bits(self.examples, [])

    def measure(self) -> Gain:
        """Measure the fuser as it is now.

        Raises:
            RecipeError: Its loss is not finite.
        """
        # Without dropout and gate noise
        fuser = self.pair.fusers[0]
        training = fuser.training
        fuser.eval()
        fused, mismatched = (self._bits(examples, None) for examples in (self.examples, self.mismatched))
        fuser.train(training)
        if not math.isfinite(fused):
            raise RecipeError(f"expected a finite loss, got {fused}; train with a lower train.learning_rate")
        return Gain(self.receiver, fused, mismatched, len(self.examples))

    @torch.no_grad()
    def _bits(self, examples: Sequence[EncodedExample], fusers: Sequence[nn.Module] | None) -> float:
        """Bits per character over all responses; ``fusers`` as in :func:`kvfuse.training.loop.loss.response_loss`."""
        group = processes()
        # 1) Each process sums the losses of its share of the examples
        share, nats = examples[group.process_index :: group.num_processes], 0.0
        for start in range(0, math.ceil(len(examples) / group.num_processes), EXAMPLES_PER_BATCH):
            batch = share[start : start + EXAMPLES_PER_BATCH]
            # A process with no examples left runs one all the same: FSDP gathers a fuser in all processes at once
            loss = response_loss(self.pair, collate(batch or examples[:1]), fusers, num_items=1)
            nats += float(loss) if batch else 0.0
        # 2) All processes add up the same sums
        return sum(gather_object([nats])) / math.log(2) / self.characters


def mismatch(example: EncodedExample, donor: EncodedExample) -> EncodedExample:
    """Let the sharers of an example read the donor's prompt and, where it is fused too, the donor's response."""
    seen = np.arange(1 + len(example.response.ids))
    # A response longer than the donor's sees all of the donor's
    sharers = tuple((ids, index[np.minimum(seen, len(index) - 1)]) for ids, index in donor.response.sharers)
    response = Response(example.response.ids, sharers)
    return replace(example, prompt=swap_sharers(example.prompt, donor=donor.prompt), response=response)
