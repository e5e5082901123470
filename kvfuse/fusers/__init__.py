"""Fusers by kind; each is a small transformers model."""

from kvfuse.fusers.base import Fuser, FuserConfig, describe_gates
from kvfuse.fusers.c2c import C2CConfig, C2CFuser
from kvfuse.fusers.c2c_complex import C2CComplexConfig, C2CComplexFuser
from kvfuse.fusers.execution.quantized import QuantizedLinear, quantize, require_trainable
from kvfuse.fusers.gate import GatedConfig, GatedFuser
from kvfuse.fusers.low_rank import LowRankConfig, LowRankFuser
from kvfuse.fusers.registry import FUSERS, fuser_class, make_fuser, register_fuser
from kvfuse.fusers.ridge import RidgeConfig, RidgeFuser

__all__ = [
    "FUSERS",
    "C2CComplexConfig",
    "C2CComplexFuser",
    "C2CConfig",
    "C2CFuser",
    "Fuser",
    "FuserConfig",
    "GatedConfig",
    "GatedFuser",
    "LowRankConfig",
    "LowRankFuser",
    "QuantizedLinear",
    "RidgeConfig",
    "RidgeFuser",
    "describe_gates",
    "fuser_class",
    "make_fuser",
    "quantize",
    "register_fuser",
    "require_trainable",
]

for _kind, _cls in {
    "c2c": C2CFuser,
    "c2c-complex": C2CComplexFuser,
    "low-rank": LowRankFuser,
    "ridge": RidgeFuser,
}.items():
    register_fuser(_kind, _cls)
