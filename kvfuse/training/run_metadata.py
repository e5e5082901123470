"""``result.json``: figures of a run, its speed, and everything that its figures depend on."""

import hashlib
import importlib.metadata
import json
from dataclasses import asdict
from typing import Any

from kvfuse import __version__
from kvfuse.language_model import LanguageModel
from kvfuse.model import CacheToCache
from kvfuse.training.data.prepare import Prepared
from kvfuse.training.loop.callbacks import Throughput
from kvfuse.training.loop.validation import Gain

LIBRARIES = ("torch", "transformers", "accelerate")


def run_metadata(
    gain: Gain, throughput: Throughput | None, pair: CacheToCache, prepared: Prepared, processes: int
) -> str:
    """Describe a run as JSON.

    Args:
        gain: On held-out examples.
        throughput: Since the last start of the run; None for a fuser in closed form.
        pair: The models.
        prepared: The data.
        processes: Number of processes.
    """
    payload = {
        **asdict(gain),
        "training": None if throughput is None else throughput.to_dict(),
        "processes": processes,
        "data": {"examples": len(prepared.examples), "bad": len(prepared.bad), "fingerprint": prepared.fingerprint},
        "models": {"receiver": _describe(pair.receiver), "sharer": _describe(pair.sharers[0])},
        "versions": versions(),
    }
    return json.dumps(payload, indent=2) + "\n"


def versions() -> dict[str, str]:
    """Versions of the libraries that decide a run's figures."""
    return {"kvfuse": __version__, **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def _describe(model: LanguageModel) -> dict[str, Any]:
    """Name, commit on the Hub (None for a folder), dtype, tokenizer, and a hash of the sampled weights."""
    identity = model.identity
    return {
        "name": identity.name,
        "revision": getattr(model.model.config, "_commit_hash", None),
        "dtype": identity.dtype,
        "tokenizer": identity.tokenizer,
        "weights": hashlib.sha256(json.dumps(identity.weights).encode()).hexdigest(),
    }
