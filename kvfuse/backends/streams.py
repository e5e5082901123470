"""CUDA streams: models on one GPU read at the same time."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


def fork(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for work that may overlap with what is queued from now on; None on other devices than a GPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


@contextmanager
def run_on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Queue the work within on a stream of :func:`fork`; the work after it waits.

    Memory that is freed there is reused only by a later fork, which waits for everything that has read it.
    """
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        yield
    if stream is not None:
        torch.cuda.current_stream(stream.device).wait_stream(stream)
