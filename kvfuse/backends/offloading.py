"""Models with layers on disk or in main memory, which accelerate's hooks bring to a device when they are computed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """The device that a model's ids belong on."""
    device = model.device
    if device.type != "meta":
        return device
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    return device if hook is None else torch.device(hook.execution_device)


@contextmanager
def loaded(model: PreTrainedModel, name: str) -> Iterator[Tensor]:
    """A parameter of a model by its name, with its values even if they are on disk."""
    module, _, parameter = name.rpartition(".")
    owner = model.get_submodule(module)
    with align_module_device(owner):
        yield getattr(owner, parameter)
