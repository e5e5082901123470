"""What happens beside a run's steps."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Anneal(TrainerCallback):
    """Tells the fuser how far the run is, from the step count alone, so that a resumed run anneals alike."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.eval_strategy != "no" and state.global_step >= state.max_steps:
            control.should_evaluate = True  # the last checkpoint, too, may be the best

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        getattr(model, "module", model).set_progress(state.global_step / state.max_steps)


class OwnNoise(TrainerCallback):
    """Gives each process dropout and gate noise of its own."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (
            args.process_index
        ):  # all have seeded the order of the examples alike by now; a resumed run goes on with the noise it had
            torch.manual_seed(args.seed + args.process_index)
