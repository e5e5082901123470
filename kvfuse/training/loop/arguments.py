"""What transformers' Trainer is told of a recipe's ``train`` section."""

from pathlib import Path

import torch
from transformers import TrainingArguments

from kvfuse.support.processes import on_cpu
from kvfuse.training.recipe import TrainSection


def trainer_arguments(train: TrainSection, folder: Path, validated: bool, quiet: bool) -> TrainingArguments:
    """Arguments for a run.

    Args:
        train: The section.
        folder: For checkpoints.
        validated: Whether held-out examples choose the best checkpoint.
        quiet: Show no progress.
    """
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
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process, one GPU: Trainer would spread a batch that it cannot cut
    return arguments


def _bf16(train: TrainSection) -> bool:
    return train.bf16 is True or (train.bf16 == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported())
