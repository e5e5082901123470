"""Fusers by kind; each is a transformers model of its own."""

from typing import Any

from transformers import AutoConfig, AutoModel

from kvfuse.errors import PairError
from kvfuse.fusers.c2c import C2CConfig, C2CFuser
from kvfuse.fusers.c2c_complex import C2CComplexConfig, C2CComplexFuser
from kvfuse.fusers.contract import Fuser, FuserConfig, describe_gates

FUSERS: dict[str, type[Fuser]] = {"c2c": C2CFuser, "c2c-complex": C2CComplexFuser}

for _fuser in FUSERS.values():
    AutoConfig.register(_fuser.config_class.model_type, _fuser.config_class)
    AutoModel.register(_fuser.config_class, _fuser)


def make_fuser(kind: str, **options: Any) -> Fuser:
    """A new fuser of a kind, its weights drawn from torch's global generator.

    Args:
        kind: A key of :data:`FUSERS`.
        options: Fields of its configuration.

    Raises:
        PairError: An unknown kind, or models that the kind cannot serve.
    """
    if kind not in FUSERS:
        raise PairError(f"expected fuser.kind to be one of {', '.join(FUSERS)}, got {kind!r}; choose one")
    fuser = FUSERS[kind](FUSERS[kind].config_class(**options))
    fuser.reset_parameters()
    return fuser


__all__ = [
    "FUSERS",
    "C2CComplexConfig",
    "C2CComplexFuser",
    "C2CConfig",
    "C2CFuser",
    "Fuser",
    "FuserConfig",
    "describe_gates",
    "make_fuser",
]
