"""Activation recomputation: decoder layers keep only their inputs for the backward pass, which runs them again."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kvfuse.cache.transformers_cache import has_state
from kvfuse.errors import PairError

FLAGS = ("training", "gradient_checkpointing", "_can_checkpoint_with_cache")


@contextmanager
def recomputed_layers(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """While open, the decoder layers of a frozen model keep only their inputs.

    transformers does this for models in training mode, and drops their cache. Here the flags are set on the layers
    only, which leaves their dropout off. A layer reads the cache twice, so it must be a
    :func:`kvfuse.cache.transformers_cache.read_only_cache`.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if wanted else []
    # 1) Let transformers' layers checkpoint themselves
    before = [{flag: getattr(layer, flag) for flag in FLAGS} for layer in layers]
    for layer in layers:
        _set(layer, dict.fromkeys(FLAGS, True), partial(checkpoint, use_reentrant=False))
    try:
        yield
    finally:
        # 2) Put everything back
        for layer, flags in zip(layers, before, strict=True):
            _set(layer, flags, None)


def require_recomputable(model: PreTrainedModel) -> None:
    """Raises PairError for a model with recurrent state, whose layers cannot run twice."""
    if has_state(model.config):
        raise PairError(
            f"expected a receiver without linear attention, got {type(model).__name__}; leave out train.recompute"
        )


def _set(layer: Any, flags: dict[str, bool], function: Any) -> None:
    layer._gradient_checkpointing_func = function
    for flag, value in flags.items():
        setattr(layer, flag, value)
