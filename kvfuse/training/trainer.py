"""Train the fuser of a pair with transformers' Trainer: the trained model is the fuser, the two models only read."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import Sampler
from transformers import (
    AutoModel,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from kvfuse.fusers import Fuser
from kvfuse.model import CacheToCache
from kvfuse.token_alignment import AlignedPrompt, SharerPrompt
from kvfuse.training.batches import TrainingBatch, collate
from kvfuse.training.columns import from_columns
from kvfuse.training.loss import response_loss
from kvfuse.training.pace import Clock, Pace
from kvfuse.training.processes import on_cpu
from kvfuse.training.recipe import TrainSection
from kvfuse.training.safeguards import Safeguards, last_whole_checkpoint, told_in_one_line
from kvfuse.training.validation import Validation

if TYPE_CHECKING:
    from datasets import Dataset

GATE_LEARNING_RATE_SCALE = 20.0


class FuserTrainer(Trainer):
    """transformers' Trainer around the one fuser of a pair.

    Args:
        pair: The models; its fuser is trained in place.
        train: The recipe's ``train`` section.
        examples: What to learn, a data set of :func:`kvfuse.training.columns.to_columns`.
        folder: For checkpoints; a run that finds some there goes on from the last.
        validation: Measured with every checkpoint; the fuser ends as it was at the best of them.
        quiet: Show no progress.
    """

    def __init__(
        self,
        pair: CacheToCache,
        train: TrainSection,
        examples: "Dataset",
        folder: Path,
        validation: Validation | None = None,
        quiet: bool = False,
    ) -> None:
        self.pair, self.train_section, self.validation = pair, train, validation
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=train.steps or -1,
            num_train_epochs=train.epochs,
            per_device_train_batch_size=train.batch_size,
            gradient_accumulation_steps=train.accumulation,
            learning_rate=train.learning_rate,
            weight_decay=train.weight_decay,
            lr_scheduler_type="linear",
            warmup_steps=train.warmup,
            max_grad_norm=train.max_grad_norm,
            seed=train.seed,
            bf16=_bf16(train),
            use_cpu=on_cpu(),
            fsdp=train.fsdp or None,
            ddp_find_unused_parameters=False,  # there are none, and a response that is fused too calls the fuser twice
            include_num_input_tokens_seen="non_padding",
            save_steps=train.save_steps,
            save_total_limit=2,
            eval_strategy="no" if validation is None else "steps",
            eval_steps=train.save_steps,
            load_best_model_at_end=validation is not None,
            metric_for_best_model="eval_fused",
            greater_is_better=False,
            logging_steps=50,
            logging_strategy="no" if quiet else "steps",
            report_to=train.report_to,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=quiet,
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # one process, one GPU: Trainer would spread a batch that it cannot cut
        self.clock = Clock()
        callbacks = [
            _Anneal(),
            Safeguards(),
            self.clock,
            *([EarlyStoppingCallback(train.patience)] if train.patience and validation else []),
        ]
        options = {"train_dataset": examples, "eval_dataset": None if validation is None else validation.examples}
        super().__init__(pair.fusers[0], arguments, data_collator=_collate, callbacks=callbacks, **options)
        if quiet:
            self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss divides by the tokens of all micro-batches that Trainer counts

    def resume(self) -> Pace:
        """Train, from the last whole checkpoint if there is one.

        Returns:
            How fast it went from there.

        Raises:
            RecipeError: Memory or disk space runs out, or the weights are no numbers any more.
        """
        folder = Path(self.args.output_dir)
        with told_in_one_line(folder):
            self.train(resume_from_checkpoint=last_whole_checkpoint(folder))
        if self.train_section.fsdp:
            self.pair.fusers[0] = _gather(self.pair.fusers[0])
        return self.clock.pace

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's hook: the held-out loss of the receiver alone, fused, and with a mismatched sharer."""
        assert self.validation is not None
        metrics = {f"eval_{name}": value for name, value in vars(self.validation.measure()).items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: "Dataset | None" = None) -> Sampler[int] | None:
        """Trainer's hook."""
        if not self.train_section.group_by_length:
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return _ByLength(size, lengths=self.train_dataset["length"][:], seed=self.args.seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """Trainer's hook. ``model`` is the fuser, possibly wrapped for several processes."""
        loss = response_loss(self.pair, inputs["batch"], [model], num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # which average the gradients; the tokens are counted over all
        return (loss, None) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; the gates have a learning rate of their own and no weight decay."""
        if self.optimizer is None:
            fuser = self.pair.fusers[0]
            gates = {id(parameter) for parameter in fuser.gate_parameters()}
            rate = self.train_section.gate_learning_rate or GATE_LEARNING_RATE_SCALE * self.args.learning_rate
            groups = [
                {"params": [p for p in fuser.parameters() if id(p) not in gates], "weight_decay": self.args.weight_decay},
                {"params": fuser.gate_parameters(), "weight_decay": 0.0, "lr": rate},
            ]
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]], lr=self.args.learning_rate
            )
        return self.optimizer


class _ByLength(LengthGroupedSampler):
    """Trainer's own draws from the global random state, of which a resumed run has another at the beginning of its epoch."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loaders."""
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class _Anneal(TrainerCallback):
    """Tells the fuser how far the run is, from the step count alone, so that a resumed run anneals alike."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.eval_strategy != "no" and state.global_step >= state.max_steps:
            control.should_evaluate = True  # the last checkpoint, too, may be the best

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        getattr(model, "module", model).set_progress(state.global_step / state.max_steps)


def _gather(fuser: Fuser) -> Fuser:
    """A whole fuser, in each process, from one that is spread over all of them."""
    weights = get_model_state_dict(fuser, options=StateDictOptions(full_state_dict=True))
    whole = AutoModel.from_config(fuser.config)  # FSDP has changed the class of the other
    whole.load_state_dict(weights)
    return whole.to(next(fuser.parameters()).device)


def _bf16(train: TrainSection) -> bool:
    return train.bf16 is True or (train.bf16 == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported())


class _OwnNoise(TrainerCallback):
    """Gives each process dropout and gate noise of its own."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.process_index:  # all have seeded the order of the examples alike by now; a resumed run goes on with the noise it had
            torch.manual_seed(args.seed + args.process_index)


def _collate(rows: Sequence[dict[str, Any]]) -> dict[str, TrainingBatch | Tensor]:
    """The batch, and where Trainer looks for them its labels, the positions that are fused and how many tokens are read."""
    batch = collate([from_columns(row) for row in rows])
    return {"batch": batch, "labels": batch.labels, "input_ids": batch.prompt.ids, "attention_mask": _count_tokens(batch)}


def _count_tokens(batch: TrainingBatch) -> Tensor:
    """How many each example has the models read, ``(B,)`` int64; the tail's first is the prompt's last."""
    prompts: list[AlignedPrompt | SharerPrompt] = [batch.prompt, *batch.prompt.sharers]
    tails: list[AlignedPrompt | SharerPrompt] = [batch.tail, *batch.tail.sharers]
    return torch.stack([one.mask.sum(1) for one in prompts] + [one.mask[:, 1:].sum(1) for one in tails]).sum(0)
