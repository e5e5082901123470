"""Train the fuser of a pair with transformers' Trainer: the trained model is the fuser, the two models only read."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import Sampler
from transformers import AutoModel, EarlyStoppingCallback, PrinterCallback, Trainer, TrainerControl
from transformers.trainer_pt_utils import LengthGroupedSampler

from kvfuse.fusers import Fuser, require_trainable
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt, SharerPrompt
from kvfuse.training.data.columns import from_columns
from kvfuse.training.loop.arguments import trainer_arguments
from kvfuse.training.loop.batches import TrainingBatch, collate
from kvfuse.training.loop.callbacks import Anneal, OwnNoise
from kvfuse.training.loop.loss import response_loss
from kvfuse.training.loop.safeguards import Safeguards, last_whole_checkpoint, told_in_one_line
from kvfuse.training.loop.throughput import Pace, ThroughputCallback
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
        pair: The models; its fuser is trained in place.
        train: The recipe's ``train`` section.
        examples: What to learn, a data set of :func:`kvfuse.training.data.columns.to_columns`.
        folder: For checkpoints; a run that finds some there goes on from the last. Kept caches are in a folder beside it.
        validation: Measured with every checkpoint; the fuser ends as it was at the best of them.
        quiet: Show no progress.

    Raises:
        PairError: The fuser's weights are integers, or the receiver cannot be recomputed.
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
        require_trainable(pair.fusers[0])
        self.pair, self.train_section, self.validation = pair, train, validation
        arguments = trainer_arguments(train, folder, validated=validation is not None, quiet=quiet)
        pair.fusers[0].recompute = train.recompute
        if train.recompute:
            require_recomputable(pair.receiver.model)
        self.kept = _kept(pair, train, examples, folder)
        if self.kept is not None:
            examples = examples.add_column("row", range(len(examples)))
        self.clock = ThroughputCallback()
        patience = [EarlyStoppingCallback(train.patience)] if train.patience and validation else []
        callbacks = [Anneal(), OwnNoise(), Safeguards(), self.clock, *patience]
        options = {"train_dataset": examples, "eval_dataset": None if validation is None else validation.examples}
        super().__init__(pair.fusers[0], arguments, data_collator=self._collate, callbacks=callbacks, **options)
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
            if self.kept is not None:
                self.kept.fill(self.args.per_device_train_batch_size)
            self.train(resume_from_checkpoint=last_whole_checkpoint(folder))
        if self.kept is not None:
            self.kept.remove()
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
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's hook. ``model`` is the fuser, possibly wrapped for several processes."""
        loss = response_loss(self.pair, inputs["batch"], [model], num_items_in_batch, self.train_section.recompute)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # which average the gradients; the tokens are counted over all
        return (loss, None) if return_outputs else loss

    def _collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, TrainingBatch | Tensor]:
        """The batch, and where Trainer looks for them its labels, the positions that are fused and how many tokens are read."""
        kept = None if self.kept is None else self.kept.load([row["row"] for row in rows])
        batch = collate([from_columns(row) for row in rows], kept)
        return {
            "batch": batch,
            "labels": batch.labels,
            "input_ids": batch.prompt.ids,
            "attention_mask": _count_tokens(batch),
        }

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; the gates have a learning rate of their own and no weight decay."""
        if self.optimizer is None:
            fuser = self.pair.fusers[0]
            gates = {id(parameter) for parameter in fuser.gate_parameters()}
            rate = self.train_section.gate_learning_rate or GATE_LEARNING_RATE_SCALE * self.args.learning_rate
            groups = [
                {
                    "params": [p for p in fuser.parameters() if id(p) not in gates],
                    "weight_decay": self.args.weight_decay,
                },
                {"params": fuser.gate_parameters(), "weight_decay": 0.0, "lr": rate},
            ]
            groups = [group for group in groups if group["params"]]
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                groups, lr=self.args.learning_rate, fused=True
            )  # in one pass
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


def _kept(pair: CacheToCache, train: TrainSection, examples: "Dataset", folder: Path) -> PrecomputedCaches | None:
    if train.keep_caches == "none":
        return None
    beside = folder.parent / f"caches-{examples._fingerprint}"
    return PrecomputedCaches(pair, examples, beside, train.keep_caches == "both", train.keep_caches_as)


def _gather(fuser: Fuser) -> Fuser:
    """A whole fuser, in each process, from one that is spread over all of them."""
    weights = get_model_state_dict(fuser, options=StateDictOptions(full_state_dict=True))
    whole = AutoModel.from_config(fuser.config)  # FSDP has changed the class of the other
    whole.load_state_dict(weights)
    return whole.to(next(fuser.parameters()).device)


def _count_tokens(batch: TrainingBatch) -> Tensor:
    """How many each example has the models read, ``(B,)`` int64; the tail's first is the prompt's last."""
    prompts: list[AlignedPrompt | SharerPrompt] = [batch.prompt, *batch.prompt.sharers]
    tails: list[AlignedPrompt | SharerPrompt] = [batch.tail, *batch.tail.sharers]
    return torch.stack([one.mask.sum(1) for one in prompts] + [one.mask[:, 1:].sum(1) for one in tails]).sum(0)
