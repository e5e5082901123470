"""What keeps a run whole: only complete checkpoints are resumed from, weights that are no numbers are never saved."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kvfuse.errors import RecipeError
from kvfuse.support.files import write_file
from kvfuse.support.processes import processes

WHOLE = "whole"  # written into a checkpoint after everything else in it


class Safeguards(TrainerCallback):
    """Refuses to save what is broken, and marks what was saved to its end."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Trainer's hook, before a checkpoint is written."""
        if control.should_save and not all(
            bool(parameter.isfinite().all()) for parameter in kwargs["model"].parameters()
        ):
            raise RecipeError(
                f"expected finite weights at step {state.global_step}, got some that are not; the checkpoint before is intact: "
                "start again with a lower train.learning_rate and another output"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Trainer's hook, after a checkpoint is written; each process has written a part of it."""
        processes().wait_for_everyone()
        if state.is_world_process_zero:
            write_file(Path(args.output_dir, f"checkpoint-{state.global_step}", WHOLE), "")


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; those that a killed run left half-written are removed, by the first process."""
    with processes().main_process_first():
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        for path in checkpoints:
            if not (path / WHOLE).exists():
                shutil.rmtree(path)
        return next((str(path) for path in reversed(checkpoints) if path.exists()), None)


@contextmanager
def told_in_one_line(folder: Path) -> Iterator[None]:
    """Say what to do where memory or disk space runs out; checkpoints that are whole stay so."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RecipeError(
            "expected a batch to fit into memory, got none left; lower train.batch_size, raise train.accumulation"
        ) from error
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
            raise
        raise RecipeError(
            f"expected room for a checkpoint in {folder}, got a full disk; make room and start again to go on"
        ) from error
