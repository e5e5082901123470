"""``result.json``: what a run gained, how fast, and everything that its figures hang on."""

import hashlib
import importlib.metadata
import json
from dataclasses import asdict
from typing import Any

from kvfuse import __version__
from kvfuse.language_model import LanguageModel
from kvfuse.model import CacheToCache
from kvfuse.training.data.prepare import Prepared
from kvfuse.training.loop.throughput import Pace
from kvfuse.training.loop.validation import Gain

VERSIONS_OF = ("torch", "transformers", "accelerate")


def record(gain: Gain, pace: Pace | None, pair: CacheToCache, prepared: Prepared, processes: int) -> str:
    """All of it as JSON.

    Args:
        gain: On held-out examples.
        pace: Of the last session, where a killed run was started again; None for a fuser that is closed_form.
        pair: The models.
        prepared: The data.
        processes: How many took part.
    """
    told = {
        **asdict(gain),
        "training": None if pace is None else pace.to_dict(),
        "processes": processes,
        "data": {"examples": len(prepared.examples), "bad": len(prepared.bad), "fingerprint": prepared.fingerprint},
        "models": {"receiver": _describe(pair.receiver), "sharer": _describe(pair.sharers[0])},
        "versions": versions(),
    }
    return json.dumps(told, indent=2) + "\n"


def versions() -> dict[str, str]:
    """Of the libraries that decide a run's figures."""
    return {"kvfuse": __version__, **{name: importlib.metadata.version(name) for name in VERSIONS_OF}}


def _describe(model: LanguageModel) -> dict[str, Any]:
    """Its name, commit on the Hub (None for a folder), tokenizer and a hash of the weights that a fuser remembers."""
    identity = model.identity
    return {
        "name": identity.name,
        "revision": getattr(model.model.config, "_commit_hash", None),
        "dtype": identity.dtype,
        "tokenizer": identity.tokenizer,
        "weights": hashlib.sha256(json.dumps(identity.weights).encode()).hexdigest(),
    }
