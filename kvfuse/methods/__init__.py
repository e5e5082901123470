"""Methods: Cache-to-Cache, its baselines and its controls, under one contract."""

from kvfuse.methods.augmented import FewShot
from kvfuse.methods.base import Answer, Method, OptionScore, Reply
from kvfuse.methods.cache_to_cache import Fused
from kvfuse.methods.calibrated import Calibrated
from kvfuse.methods.controls import Mismatched, ProjectedOnly, RandomFuser, Shuffled, Zeroed
from kvfuse.methods.registry import (
    METHODS,
    WITHOUT_FUSER,
    MethodContext,
    Unfused,
    find_method,
    make_method,
    register_method,
)
from kvfuse.methods.routing import Cascade, Routed, Router
from kvfuse.methods.single import Single
from kvfuse.methods.text_to_text import Hybrid, TextToText

__all__ = [
    "METHODS",
    "WITHOUT_FUSER",
    "Answer",
    "Calibrated",
    "Cascade",
    "FewShot",
    "Fused",
    "Hybrid",
    "Method",
    "MethodContext",
    "Mismatched",
    "OptionScore",
    "ProjectedOnly",
    "RandomFuser",
    "Reply",
    "Routed",
    "Router",
    "Shuffled",
    "Single",
    "TextToText",
    "Unfused",
    "Zeroed",
    "find_method",
    "make_method",
    "register_method",
]
