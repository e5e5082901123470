"""A case: a pair with a prompt of some size. And the bars: the most that its figures should be."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from benchmarks.machine import Machine
from benchmarks.pairs import prompt_for, random_caches, random_fuser
from benchmarks.rows import Row, row, spread_row
from kvfuse.fusers import Fuser
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt
from kvfuse.stages.prefill import ModelCaches

BARS: dict[str, dict[int, float]] = {
    "fuse / bare products": {256: 1.25},
    "fuse, int8 / fp32": {256: 0.6},
    "fuse per token, 4096 / 256": {4096: 1.15},
    "first token / (receiver + sharer prefills + bare products)": {256: 1.1},
    "first token / receiver's": {256: 2.4, 1024: 2.4},
    "first token / receiver's, low-rank": {256: 1.85, 1024: 1.85},
    "decode per token / receiver's": {256: 1.03},
    "C2C to 8 tokens / text-to-text": {64: 0.35, 256: 0.35},
    "peak memory of a fused prefill / (models + caches + fuser)": {256: 1.15, 1024: 1.15, 4096: 1.15},
}
"""Figure -> prompt tokens -> bar: at true shapes, one prompt at a time, one thread of a CPU in float32."""
GPU_BARS: dict[str, dict[int, float]] = {
    "fuse": {256: 5.0},
    "fuse / roofline": {256: 3.0},
    "fuse, queued behind other work / roofline": {256: 3.0},
    "fuse, queued behind other work, folded / roofline": {256: 3.0},
    "kernel launches of a fuse": {256: 40},
    "device-to-host copies of a fuse": {256: 0},
    "first token / receiver's": {256: 1.5},
    "first token / receiver's, captured": {256: 1.5},
}
"""The same on a GPU in bfloat16."""


@dataclass(frozen=True)
class Case:
    """One pair and the size of its prompts.

    Attributes:
        shapes: Name of the pair, see :data:`benchmarks.pairs.SHAPES`.
        pair: Its models and fuser.
        batch: Number of prompts.
        tokens: Length of each prompt.
        repeats: Number of rounds of every timing.
        machine: Peak speeds of the hardware, measured in this run.
    """

    shapes: str
    pair: CacheToCache
    batch: int
    tokens: int
    repeats: int
    machine: Machine

    def __str__(self) -> str:
        return f"{self.shapes}, {self.batch} x {self.tokens} tokens"

    @cached_property
    def prompt(self) -> AlignedPrompt:
        return prompt_for(self.pair, self.batch, self.tokens)

    @property
    def fused_tokens(self) -> int:
        """All tokens of the batch but the last of each prompt."""
        return self.prompt.ids.numel() - self.batch

    def new_caches(self) -> ModelCaches:
        """Caches as if the prompt had been read; new ones each time, because fusing may overwrite them."""
        return random_caches(self.pair, self.prompt)

    @cached_property
    def low_rank(self) -> Fuser:
        """A small fuser for the same models."""
        alignment = self.pair.fusers[0].config.token_alignment
        return random_fuser(
            "low-rank", receiver=self.pair.receiver, sharer=self.pair.sharers[0], token_alignment=alignment
        )

    def row(self, figure: str, value: float, unit: str) -> Row:
        """A row about this case, with its bar if it has one."""
        return row(figure, str(self), value, self._bar(figure), unit)

    def timed_row(self, figure: str, values: Sequence[float], unit: str) -> Row:
        """The same for several rounds."""
        return spread_row(figure, str(self), values, self._bar(figure), unit)

    def _bar(self, figure: str) -> float | None:
        # bars hold for one prompt at true shapes only
        bars = BARS if self.pair.receiver.model.device.type == "cpu" else GPU_BARS
        return bars.get(figure, {}).get(self.tokens) if (self.shapes, self.batch) == ("true", 1) else None
