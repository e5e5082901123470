"""How fast training goes."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@dataclass(frozen=True)
class Pace:
    """How fast a session of training went, checkpoints and validation included.

    Attributes:
        steps: Optimizer steps.
        seconds: From the first to the end of the last.
        tokens: Read in all processes: prompts by both models, responses by the receiver and, where they are fused too, the sharer.
    """

    steps: int
    seconds: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.steps:,} steps in {self.seconds:,.1f} s, {self.tokens / self.seconds:,.0f} tokens a second"

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "tokens_per_second": self.tokens / self.seconds}


class ThroughputCallback(TrainerCallback):
    """Measures a session."""

    pace: Pace

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trainer's hook, after a checkpoint is read."""
        self.begin = time.perf_counter(), state.global_step, state.num_input_tokens_seen

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trainer's hook, after the best checkpoint is read."""
        seconds, steps, tokens = self.begin
        self.pace = Pace(state.global_step - steps, time.perf_counter() - seconds, state.num_input_tokens_seen - tokens)
