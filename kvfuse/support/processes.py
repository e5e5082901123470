"""One run in several processes, as ``torchrun`` and ``accelerate launch`` start them; a single process is the first."""

import atexit
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState

TIMEOUT = timedelta(hours=12)  # the others wait while the first encodes, which takes longer than torch's half hour


def processes() -> PartialState:
    """The number of this process among all, and barriers to wait for the others; the first call joins them."""
    return PartialState(cpu=on_cpu(), timeout=TIMEOUT)


@atexit.register
def leave() -> None:
    """Leave the group of processes: gloo's threads, still running as the interpreter ends, can abort the process.

    NCCL has no such threads, and would make a process that failed wait for the others.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO:
        dist.destroy_process_group()


def on_cpu() -> bool:
    """True where there is no accelerator; accelerate must know, or takes each of several processes for the only one."""
    return not torch.accelerator.is_available()
