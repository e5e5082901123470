"""kvfuse: language models that talk through their KV-caches instead of text (Cache-to-Cache, arXiv 2510.03215)."""

from typing import Any

__all__ = ["KV", "CacheToCache", "KVFuseError", "KVSpec", "LanguageModel", "PrefixStore", "load_fuser", "save_fuser"]
__version__ = "0.1.0"

_HOMES = {
    "CacheToCache": "model",
    "KV": "cache.kv",
    "KVFuseError": "errors",
    "KVSpec": "cache.kv",
    "LanguageModel": "language_model",
    "PrefixStore": "stages.prefix_store",
    "load_fuser": "checkpoint",
    "save_fuser": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that ``import kvfuse`` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kvfuse' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"kvfuse.{_HOMES[name]}"), name)
