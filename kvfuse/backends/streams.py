"""CUDA streams: models on one GPU read at the same time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def fork(device: torch.device) -> AbstractContextManager[None]:
    """A context whose work may overlap with what is queued from now on; the work after the context waits for both.

    On other devices than a GPU it does nothing. Memory that is freed within is reused only by a later fork, which waits
    for everything that has read it.
    """
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return _run_on(stream)


@contextmanager
def _run_on(stream: torch.cuda.Stream) -> Iterator[None]:
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(stream.device).wait_stream(stream)
