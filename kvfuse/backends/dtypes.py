"""The dtype that a device computes in at full speed: many CPUs emulate half precision, several times slower."""

import logging
import time
from functools import cache

import torch

MATRIX_SIZE, REPETITIONS = 512, 5  # about 50 ms on a CPU
logger = logging.getLogger("kvfuse")


@cache
def products_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Multiply-adds per second in matrix products, measured once."""
    matrix = torch.rand(MATRIX_SIZE, MATRIX_SIZE, device=device).to(dtype)
    float((matrix @ matrix).sum())  # warm up
    start = time.perf_counter()
    float(sum((matrix @ matrix).sum() for _ in range(REPETITIONS)))
    return REPETITIONS * MATRIX_SIZE**3 / (time.perf_counter() - start)


def fast_dtype(stored: torch.dtype, device: torch.device, name: str = "") -> torch.dtype:
    """The dtype to load weights in where the user names none: as stored, or float32 on a CPU that is faster with it.

    Args:
        stored: Dtype of the weights.
        device: Where they will be.
        name: Of the model, for a line in the log where it is not ``stored``.
    """
    if device.type != "cpu" or stored.itemsize >= 4 or not stored.is_floating_point:
        return stored
    if products_per_second(stored, device) >= products_per_second(torch.float32, device):
        return stored
    if name:
        half = str(stored).removeprefix("torch.")
        logger.warning("%s: loaded in float32, since this CPU multiplies %s more slowly (dtype=…)", name, half)
    return torch.float32
