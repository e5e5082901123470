"""Callbacks of transformers' Trainer: gate annealing and noise, complete checkpoints, throughput."""

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kvfuse.errors import RecipeError
from kvfuse.support.files import write_file
from kvfuse.support.processes import processes

WHOLE = "whole"  # the last file written into a checkpoint


class Schedule(TrainerCallback):
    """Runs what depends on the step. It depends only on the step count, so that a resumed run behaves the same."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give each process its own dropout and gate noise, after all have seeded the order of the examples alike."""
        if args.process_index:  # a resumed run restores the noise of its checkpoint after this
            torch.manual_seed(args.seed + args.process_index)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Anneal the gates."""
        model = kwargs["model"]  # wrapped where there are several processes
        getattr(model, "module", model).set_progress(state.global_step / state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate after the last step: its checkpoint may be the best."""
        if args.eval_strategy != "no" and state.global_step >= state.max_steps:
            control.should_evaluate = True


class Safeguards(TrainerCallback):
    """Refuses to save broken weights, and marks checkpoints that are complete."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Trainer's hook, before a checkpoint is written."""
        parameters = kwargs["model"].parameters()
        if control.should_save and not all(bool(parameter.isfinite().all()) for parameter in parameters):
            raise RecipeError(
                f"expected finite weights at step {state.global_step}, got NaN or infinity; the checkpoint before is "
                "intact: start again with a lower train.learning_rate and another output"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook, after a checkpoint is written; each process has written a part of it."""
        processes().wait_for_everyone()
        if state.is_world_process_zero:
            write_file(Path(args.output_dir, f"checkpoint-{state.global_step}", WHOLE), "")


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint. The first process removes those that a killed run left half-written."""
    with processes().main_process_first():
        # checkpoint-1000 comes after checkpoint-200
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        for path in checkpoints:
            if not (path / WHOLE).exists():
                shutil.rmtree(path)
        return next((str(path) for path in reversed(checkpoints) if path.exists()), None)


@dataclass(frozen=True)
class Throughput:
    """Speed of one training session, checkpoints and validation included.

    Attributes:
        steps: Optimizer steps.
        seconds: Wall-clock time.
        tokens: Tokens read by all processes: prompts by both models, responses by the receiver, and by the sharer where
            they are fused too.
    """

    steps: int
    seconds: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.steps:,} steps in {self.seconds:,.1f} s, {self.tokens / self.seconds:,.0f} tokens a second"

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "tokens_per_second": self.tokens / self.seconds}


class ThroughputCallback(TrainerCallback):
    """Measures the :class:`Throughput` of a session."""

    throughput: Throughput

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook, after a checkpoint is read."""
        self.begin = time.perf_counter(), state.global_step, state.num_input_tokens_seen

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer's hook, after the best checkpoint is read."""
        start, steps, tokens = self.begin
        seconds = time.perf_counter() - start
        self.throughput = Throughput(state.global_step - steps, seconds, state.num_input_tokens_seen - tokens)
