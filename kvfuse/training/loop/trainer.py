"""Train the fuser of a pair with transformers' Trainer: the trained model is the fuser, the two models only read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import Sampler
from transformers import AutoModel, EarlyStoppingCallback, PrinterCallback, Trainer, TrainerControl, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from kvfuse.errors import RecipeError
from kvfuse.fusers import Fuser, require_trainable
from kvfuse.model import CacheToCache
from kvfuse.support.processes import on_cpu
from kvfuse.training.data.columns import from_columns
from kvfuse.training.loop.batches import TrainingBatch, collate
from kvfuse.training.loop.callbacks import Safeguards, Schedule, Throughput, ThroughputCallback, last_whole_checkpoint
from kvfuse.training.loop.loss import response_loss
from kvfuse.training.loop.validation import Validation
from kvfuse.training.memory.precomputed_caches import PrecomputedCaches
from kvfuse.training.memory.recompute import require_recomputable
from kvfuse.training.recipe import TrainSection

if TYPE_CHECKING:
    from datasets import Dataset

GATE_LEARNING_RATE_SCALE = 20.0


class FuserTrainer(Trainer):
    """transformers' Trainer around the one fuser of a pair.

    Args:
        pair: The models; the fuser is trained in place.
        train: The recipe's ``train`` section.
        examples: Training examples, a data set of :func:`kvfuse.training.data.columns.to_columns`.
        folder: For checkpoints; a run resumes from the last one it finds there. Precomputed caches go next to it.
        validation: Measured at each checkpoint; the fuser ends as it was at the best of them.
        quiet: Show no progress.

    Raises:
        PairError: The fuser is quantised, or the receiver cannot be recomputed.
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
        # 1) What is asked for must be possible
        require_trainable(pair.fusers[0])
        self.pair, self.train_section, self.validation = pair, train, validation
        pair.fusers[0].recompute = train.recompute
        if train.recompute:
            require_recomputable(pair.receiver.model)
        # 2) Prompt caches, found again by the row of each example
        self.caches: PrecomputedCaches | None = None
        if train.keep_caches != "none":
            cache_folder, both = folder.parent / f"caches-{examples._fingerprint}", train.keep_caches == "both"
            self.caches = PrecomputedCaches(pair, examples, cache_folder, receiver=both, dtype=train.keep_caches_as)
            examples = examples.add_column("row", range(len(examples)))
        # 3) Trainer itself
        self.clock = ThroughputCallback()
        patience = [EarlyStoppingCallback(train.patience)] if train.patience and validation else []
        super().__init__(
            pair.fusers[0],
            _arguments(train, folder, validated=validation is not None, quiet=quiet),
            data_collator=self._collate,
            train_dataset=examples,
            eval_dataset=None if validation is None else validation.examples,
            callbacks=[Schedule(), Safeguards(), self.clock, *patience],
        )
        if quiet:
            self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # Trainer then counts the tokens of all micro-batches for the loss

    def resume(self) -> Throughput:
        """Train, from the last complete checkpoint if there is one.

        Returns:
            The throughput since then.

        Raises:
            RecipeError: Memory runs out, or the weights are no longer finite.
        """
        folder = Path(self.args.output_dir)
        with _explain_shortage():
            if self.caches is not None:
                self.caches.fill(self.args.per_device_train_batch_size, quiet=self.args.disable_tqdm)
            self.train(resume_from_checkpoint=last_whole_checkpoint(folder))
        # A run that did not end keeps its caches for the next
        if self.caches is not None:
            self.caches.remove()
        if self.train_section.fsdp:
            self.pair.fusers[0] = _gather(self.pair.fusers[0])
        return self.clock.throughput

    def _run_epoch(self, **options: Any) -> None:
        """Trainer's hook: an epoch, but none where the run was killed after its last step, which would add a step."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**options)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's hook: the held-out loss of the receiver alone, fused, and with a mismatched sharer."""
        assert self.validation is not None
        measured = vars(self.validation.measure())
        metrics = {f"eval_{name}": value for name, value in measured.items() if isinstance(value, int | float)}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: "Dataset | None" = None) -> Sampler[int] | None:
        """Trainer's hook."""
        if not self.train_section.group_by_length:
            return super()._get_train_sampler(train_dataset)
        # Group over what one optimizer step reads
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return _SeededLengthSampler(size, lengths=self.train_dataset["length"][:], seed=self.args.seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's hook. ``model`` is the fuser, wrapped where there are several processes."""
        loss = response_loss(self.pair, inputs["batch"], [model], num_items_in_batch, self.train_section.recompute)
        if num_items_in_batch is not None:
            # Tokens are counted over all processes, and gradients averaged over them: undo the average
            loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def _collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, TrainingBatch | Tensor]:
        """A batch, with labels and numbers of tokens under the names that Trainer looks for."""
        known = None if self.caches is None else self.caches.load([row["row"] for row in rows])
        batch = collate([from_columns(row) for row in rows], known)
        tokens = {"input_ids": batch.prompt.ids, "attention_mask": _count_tokens(batch)}
        return {"batch": batch, "labels": batch.labels, **tokens}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; gates have a separate learning rate and no weight decay."""
        if self.optimizer is None:
            fuser, rate = self.pair.fusers[0], self.args.learning_rate
            # 1) Tell gates from other parameters: tensors cannot be compared, ids can
            gates = fuser.gate_parameters()
            gate_ids = set(map(id, gates))
            others = [parameter for parameter in fuser.parameters() if id(parameter) not in gate_ids]
            # 2) One group each; AdamW refuses empty groups
            gate_rate = self.train_section.gate_learning_rate or GATE_LEARNING_RATE_SCALE * rate
            groups = [
                {"params": others, "weight_decay": self.args.weight_decay},
                {"params": gates, "weight_decay": 0.0, "lr": gate_rate},
            ]
            groups = [group for group in groups if group["params"]]
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
        return self.optimizer


def _arguments(train: TrainSection, folder: Path, *, validated: bool, quiet: bool) -> TrainingArguments:
    """Arguments for a run.

    Args:
        train: The section.
        folder: For checkpoints.
        validated: Whether held-out examples choose the best checkpoint.
        quiet: Show no progress.
    """
    bf16_works = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
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
        bf16=bf16_works if train.bf16 == "auto" else train.bf16,
        use_cpu=on_cpu(),
        fsdp=train.fsdp or None,
        ddp_find_unused_parameters=False,  # all are used, but a fused response calls the fuser twice
        include_num_input_tokens_seen="non_padding",
        save_steps=train.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if validated else "no",
        eval_steps=train.save_steps,
        load_best_model_at_end=validated,
        metric_for_best_model="eval_fused",
        greater_is_better=False,
        logging_steps=50,
        logging_strategy="no" if quiet else "steps",
        report_to=train.report_to,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=quiet,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # else one process splits batches over GPUs, and ours cannot be split
    return arguments


@contextmanager
def _explain_shortage() -> Iterator[None]:
    """Raise a one-line RecipeError where memory runs out; complete checkpoints stay intact."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RecipeError(
            "expected a batch to fit into memory, got none left; lower train.batch_size, raise train.accumulation"
        ) from error


class _SeededLengthSampler(LengthGroupedSampler):
    """Groups examples by length in an order decided by seed and epoch.

    Trainer's own sampler draws from the global random state, which differs when a resumed run begins its epoch.
    """

    def __init__(self, batch_size: int, *, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loaders."""
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


def _gather(fuser: Fuser) -> Fuser:
    """The whole fuser, in each process, from the parts of an FSDP fuser."""
    weights = get_model_state_dict(fuser, options=StateDictOptions(full_state_dict=True))
    whole = AutoModel.from_config(fuser.config)  # FSDP changes the class of the old one
    whole.load_state_dict(weights)
    return whole.to(next(fuser.parameters()).device)


def _count_tokens(batch: TrainingBatch) -> Tensor:
    """Number of tokens that the models read of each example, ``(B,)`` int64."""
    prompts = [batch.prompt.mask, *(sharer.mask for sharer in batch.prompt.sharers)]
    tails = [batch.tail.mask, *(sharer.mask for sharer in batch.tail.sharers)]
    responses = [mask[:, 1:] for mask in tails]  # a tail begins with the prompt's last token
    return torch.stack([mask.sum(1) for mask in (*prompts, *responses)]).sum(0)
