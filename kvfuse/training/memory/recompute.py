"""Less memory for more arithmetic: what a layer computes inside is not kept for the backward pass, but computed again there."""

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
    """While open, the decoder layers of a frozen model keep their inputs alone.

    transformers does this for models in training, and drops their cache; the layers of this one are told so each for
    itself, which leaves dropout within them off. The cache must be :func:`kvfuse.cache.transformers_cache.read_only_cache`'s: a layer reads
    it twice.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if wanted else []
    before = [{flag: getattr(layer, flag) for flag in FLAGS} for layer in layers]
    for layer in layers:
        _set(layer, dict.fromkeys(FLAGS, True), partial(checkpoint, use_reentrant=False))
    try:
        yield
    finally:
        for layer, flags in zip(layers, before, strict=True):
            _set(layer, flags, None)


def require_recomputable(model: PreTrainedModel) -> None:
    """Refuse models whose layers cannot be run twice. Raises PairError where they keep recurrent state."""
    if has_state(model.config):
        raise PairError(
            f"expected a receiver without linear attention where train.recompute is set, got {type(model).__name__}; leave it out"
        )


def _set(layer: Any, flags: dict[str, bool], function: Any) -> None:
    layer._gradient_checkpointing_func = function
    for flag, value in flags.items():
        setattr(layer, flag, value)
