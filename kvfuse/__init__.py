"""kvfuse: language models that communicate through KV-caches instead of text (Cache-to-Cache, arXiv 2510.03215)."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> module. Imported on first use, so that ``import kvfuse`` loads neither torch nor transformers.
_HOMES = {
    "AnalysisError": "errors",
    "CacheToCache": "model",
    "CheckpointError": "errors",
    "EvaluationError": "errors",
    "Fuser": "fusers",
    "KV": "cache.kv",
    "KVFuseError": "errors",
    "KVSpec": "cache.kv",
    "LanguageModel": "language_model",
    "MethodError": "errors",
    "PairError": "errors",
    "PrefixStore": "stages.prefix_store",
    "PromptError": "errors",
    "RecipeError": "errors",
    "load_fuser": "checkpoint",
    "make_fuser": "fusers",
    "make_method": "methods",
    "register_fuser": "fusers",
    "register_method": "methods",
    "save_fuser": "checkpoint",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvfuse' has no attribute {name!r}")
    return getattr(import_module(f"kvfuse.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
