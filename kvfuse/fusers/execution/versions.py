"""Whether somebody has written to a parameter, told without reading it."""

from typing import Any

from torch import Tensor


def version_of(parameter: Tensor) -> tuple[Any, ...]:
    """What is another one once a parameter was changed in place, cast, moved or cut; ``parameter.data`` is written to without a trace."""
    version = 0 if parameter.is_inference() else parameter._version
    return version, parameter.data_ptr(), parameter.shape, parameter.dtype, parameter.device
