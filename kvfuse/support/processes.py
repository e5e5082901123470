"""One run in several processes, as ``torchrun`` and ``accelerate launch`` start them; alone, the only one is the first."""

import atexit
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState

PATIENCE = timedelta(
    hours=12
)  # the others wait while the first encodes, which takes longer than the half hour of torch


def processes() -> PartialState:
    """Which of how many this one is, and what to wait for the others with; who asks first joins them."""
    return PartialState(cpu=on_cpu(), timeout=PATIENCE)


@atexit.register
def leave() -> None:
    """Leave the others: gloo's threads, where they still run as the interpreter ends, now and then abort the process.

    NCCL has none such, and would have one that failed wait for the others.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO:
        dist.destroy_process_group()


def on_cpu() -> bool:
    """Whether there is no accelerator; unless told, accelerate takes each of several processes without one to be alone."""
    return not torch.accelerator.is_available()
