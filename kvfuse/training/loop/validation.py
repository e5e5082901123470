"""Held-out loss: the receiver alone, fused, and fused with a mismatched sharer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn

from kvfuse.errors import RecipeError
from kvfuse.evaluation.scoring.statistics import MIN_ITEMS, Interval, bootstrap_ratio
from kvfuse.methods.controls import swap_sharers
from kvfuse.methods.donors import choose_donors
from kvfuse.model import CacheToCache
from kvfuse.prompts.response import Response
from kvfuse.support.processes import processes
from kvfuse.training.data.columns import EncodedExample
from kvfuse.training.loop.batches import collate
from kvfuse.training.loop.loss import example_losses

EXAMPLES_PER_BATCH = 16


@dataclass(frozen=True)
class Gain:
    """Bits per character of held-out responses.

    Attributes:
        receiver: Of the receiver alone.
        fused: Fused.
        mismatched: Fused with sharers that read another example: a gain that remains is not communication. None where
            no example has another, i.e. a donor with another prompt.
        examples: Number of responses.
        gain_interval: 95% interval of ``receiver - fused``, by the bootstrap over responses.
        content_interval: 95% interval of ``mismatched - fused``.
    """

    receiver: float
    fused: float
    mismatched: float | None
    examples: int
    gain_interval: Interval | None = None
    content_interval: Interval | None = None

    def __str__(self) -> str:
        control = "no control, since no example has another one to read"
        if self.mismatched is not None:
            control = self._figure(self.mismatched, "with a sharer that read another example")
        return (
            f"Held-out responses ({self.examples}): {self.receiver:.3f} bits per character for the receiver alone, "
            f"{self._figure(self.fused, 'fused')}, {control}. {self._verdict()}"
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
                *(
                    f"| {name} | {bits:.3f} | {bits / self.receiver - 1:+.1%} |"
                    for name, bits in rows.items()
                    if bits is not None
                ),
            ]
        )

    def _figure(self, bits: float, name: str) -> str:
        return f"{bits:.3f} {name} ({bits / self.receiver - 1:+.1%})"

    def _verdict(self) -> str:
        """What the intervals show; nothing where there are too few responses."""
        if self.examples < MIN_ITEMS or self.gain_interval is None:
            return f"No verdict: it takes at least {MIN_ITEMS} held-out responses; raise data.validation_share."
        # 1) Against the receiver alone
        low, high = self.gain_interval
        shown = _bits(self.receiver - self.fused, self.gain_interval)
        if low <= 0:
            lost = "it is worse" if high < 0 else "no gain can be shown"
            return f"The fused receiver does NOT beat the receiver alone: {lost} ({shown})."
        gain = f"The fused receiver beats the receiver alone by {shown}"
        # 2) Against the control
        if self.mismatched is None or self.content_interval is None:
            return f"{gain}; without a control, no part of it is known to be communication."
        content = _bits(self.mismatched - self.fused, self.content_interval)
        if self.content_interval[0] <= 0:
            return f"{gain}, but no part of it can be shown to need the sharer to have read this example ({content})."
        return f"{gain}, and a sharer that read this example beats one that read another by {content}."


def _bits(difference: float, interval: Interval) -> str:
    return f"{difference:.3f} [{interval[0]:.3f}, {interval[1]:.3f}] bits per character"


class Validation:
    """Held-out examples, with the receiver's own loss on them, which training does not change.

    Several processes share the examples and add up their losses. All get the same figures, to the bit, and so agree on
    the best checkpoint and on when to stop.

    Args:
        pair: The models and the fuser.
        examples: At least one; each reads another's prompt as the control (:func:`kvfuse.methods.donors.choose_donors`,
            by length).
        characters: Length of each response.
    """

    def __init__(self, pair: CacheToCache, examples: Sequence[EncodedExample], characters: Sequence[int]) -> None:
        self.pair, self.examples = pair, list(examples)
        self.characters = np.asarray(characters, dtype=float)  # (N,)
        self.mismatched = _mismatched(self.examples)
        self.receiver_bits = self._bits(self.examples, [])  # (N,)
        self.receiver = self._per_character(self.receiver_bits)

    def measure(self) -> Gain:
        """Measure the fuser as it is now.

        Raises:
            RecipeError: Its loss is not finite.
        """
        # 1) Without dropout and gate noise
        fuser = self.pair.fusers[0]
        training = fuser.training
        fuser.eval()
        fused = self._bits(self.examples, None)
        mismatched = self._bits(self.mismatched, None) if self.mismatched else None
        fuser.train(training)
        if not np.isfinite(fused).all():
            raise RecipeError(f"expected a finite loss, got {fused.sum()}; train with a lower train.learning_rate")
        # 2) Means with the intervals of their paired differences
        return Gain(
            self.receiver,
            self._per_character(fused),
            None if mismatched is None else self._per_character(mismatched),
            len(self.examples),
            self._interval(self.receiver_bits - fused),
            None if mismatched is None else self._interval(mismatched - fused),
        )

    def _per_character(self, bits: np.ndarray) -> float:
        return float(bits.sum() / self.characters.sum())

    def _interval(self, bits: np.ndarray) -> Interval | None:
        """The bootstrap interval of bits per character, or None from a single response, which cannot be resampled."""
        if len(bits) < 2:
            return None
        groups = [str(index) for index in range(len(bits))]
        return bootstrap_ratio(part=bits, whole=self.characters, groups=groups)[1]

    @torch.no_grad()
    def _bits(self, examples: Sequence[EncodedExample], fusers: Sequence[nn.Module] | None) -> np.ndarray:
        """``(N,)`` bits of each response; ``fusers`` as in :func:`kvfuse.training.loop.loss.response_loss`."""
        group = processes()
        # 1) Each process takes its share of the examples
        share, nats = examples[group.process_index :: group.num_processes], []
        for start in range(0, math.ceil(len(examples) / group.num_processes), EXAMPLES_PER_BATCH):
            batch = share[start : start + EXAMPLES_PER_BATCH]
            # A process with no examples left runs one all the same: FSDP gathers a fuser in all processes at once
            losses = example_losses(self.pair, collate(batch or examples[:1]), fusers)
            nats += losses.tolist()[: len(batch)]
        # 2) All processes put the same shares in the order of the examples
        indices = range(group.process_index, len(examples), group.num_processes)
        gathered = sorted(gather_object(list(zip(indices, nats, strict=True))))
        return np.array([loss for _, loss in gathered]) / math.log(2)


def _mismatched(examples: Sequence[EncodedExample]) -> list[EncodedExample]:
    """Each example with the sharers' part of its donor; empty where all prompts are the same, or there is but one."""
    prompts = [[sharer.ids.tobytes() for sharer, _ in example.prompt.sharers] for example in examples]
    lengths = [len(example.prompt.receiver.ids) for example in examples]
    donors = choose_donors(
        range(len(examples)), key=lengths.__getitem__, accept=lambda item, donor: prompts[item] != prompts[donor]
    )
    return [mismatch(examples[i], examples[donor]) for i, donor in enumerate(donors) if donor is not None]


def mismatch(example: EncodedExample, donor: EncodedExample) -> EncodedExample:
    """Let the sharers of an example read the donor's prompt and, where it is fused too, the donor's response."""
    seen = np.arange(1 + len(example.response.ids))
    # A response longer than the donor's sees all of the donor's
    sharers = tuple((ids, index[np.minimum(seen, len(index) - 1)]) for ids, index in donor.response.sharers)
    response = Response(example.response.ids, sharers)
    return replace(example, prompt=swap_sharers(example.prompt, donor=donor.prompt), response=response)
