"""Train the fuser of a pair with transformers' Trainer: the trained model is the fuser, the two models only read."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Cache, PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint

from kvfuse.follow import read_along
from kvfuse.kv_cache import stage
from kvfuse.model import CacheToCache
from kvfuse.training.batches import TrainingBatch, collate
from kvfuse.training.columns import EncodedExample, from_columns
from kvfuse.training.recipe import TrainSection

if TYPE_CHECKING:
    from datasets import Dataset

GATE_LEARNING_RATE_SCALE = 20.0


def response_loss(
    pair: CacheToCache, batch: TrainingBatch, fusers: Sequence[nn.Module] | None = None, num_items: Tensor | int | None = None
) -> Tensor:
    """Next-token loss of the receiver on the responses, over the fused cache of the prompts (paper, 3.3.4).

    Args:
        pair: The models; gradients flow through the frozen receiver into the fusers.
        batch: Prompts, responses, labels.
        fusers: In place of the pair's own, e.g. wrapped; an empty list gives the receiver's own loss.
        num_items: Divide the summed loss by this many tokens; by default by those of the batch.

    Returns:
        0-d float32 in nats.
    """
    receiver, past = pair.receiver.model, batch.prompt.mask[:, :-1]
    mask = torch.cat([past, batch.tail.mask], dim=1)
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    output = receiver(
        input_ids=batch.tail.ids.to(receiver.device),
        attention_mask=mask.to(receiver.device),
        position_ids=batch.tail.positions.to(receiver.device),
        past_key_values=_fused_cache(pair, batch, pair.fusers if fusers is None else fusers),
        labels=batch.labels.to(receiver.device),
        **options,
    )
    return output.loss


def _fused_cache(pair: CacheToCache, batch: TrainingBatch, fusers: Sequence[nn.Module]) -> Cache | None:
    """The cache of the prompts, and where the response is fused too, the keys and values that its tokens will have."""
    if batch.prompt.ids.shape[1] < 2:
        return None
    streams = pair.read(batch.prompt, len(fusers))
    cache = pair.fuse(batch.prompt, streams, fusers)
    if pair.fuse_response and fusers:
        stage(cache, read_along(pair.receiver, pair.sharers, fusers, pair.fusion, streams, batch.prompt, batch.tail))
    return cache


class FuserTrainer(Trainer):
    """transformers' Trainer around the one fuser of a pair.

    Args:
        pair: The models; its fuser is trained in place.
        train: The recipe's ``train`` section.
        examples: What to learn, a data set of :func:`kvfuse.training.columns.to_columns`.
        folder: For checkpoints; a run that finds some there goes on from the last.
    """

    def __init__(self, pair: CacheToCache, train: TrainSection, examples: "Dataset", folder: Path, quiet: bool = False) -> None:
        self.pair, self.train_section = pair, train
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
            save_steps=train.save_steps,
            save_total_limit=2,
            logging_steps=50,
            logging_strategy="no" if quiet else "steps",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=quiet,
        )
        super().__init__(pair.fusers[0], arguments, data_collator=_collate, train_dataset=examples, callbacks=[_Anneal()])
        if quiet:
            self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss divides by the tokens of all micro-batches that Trainer counts

    def resume(self) -> None:
        """Train, from the last whole checkpoint if there is one."""
        folder = Path(self.args.output_dir)
        self.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)

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


@torch.no_grad()
def bits_per_response(pair: CacheToCache, examples: Sequence[EncodedExample], fused: bool, batch_size: int = 16) -> float:
    """Mean bits the receiver needs for a response, from its own cache or the fused one."""
    nats = 0.0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size])
        nats += float(response_loss(pair, batch, fusers=None if fused else [], num_items=1))
    return nats / math.log(2) / len(examples)


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

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        getattr(model, "module", model).set_progress(state.global_step / state.max_steps)


def _collate(rows: Sequence[dict[str, Any]]) -> dict[str, TrainingBatch | Tensor]:
    batch = collate([from_columns(row) for row in rows])
    return {"batch": batch, "labels": batch.labels}  # the labels once more where Trainer looks for them
