"""The demo's folder: one is shipped inside the package, ``kvfuse demo build`` makes another.

```
facts.json            the world
train.jsonl           questions and answers about its training places, for the fusers
sharer/  receiver/    models and tokenizers, float16
fuser-0/  fuser-1/ …  one fuser per training seed
router.safetensors    the query router of the baseline ``routing``
provenance.json       recipe, sources, versions, date, threshold of the baseline ``cascade``, measured figures
```
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kvfuse.checkpoint import load_fuser
from kvfuse.demo.facts import Place, load_places
from kvfuse.errors import CheckpointError
from kvfuse.language_model import LanguageModel
from kvfuse.methods import Router
from kvfuse.model import CacheToCache
from kvfuse.support.files import write_file

SHIPPED = Path(__file__).parent / "data"


@dataclass(frozen=True)
class PairFolder:
    """The parts of a pair's folder, each loaded when it is first used."""

    path: Path = SHIPPED

    def __post_init__(self) -> None:
        if not (self.path / "facts.json").is_file():
            raise CheckpointError(
                f"expected an embedded pair in {self.path}, got no facts.json there; make one with 'kvfuse demo build'"
            )

    @cached_property
    def places(self) -> list[Place]:
        return load_places(self.path / "facts.json")

    @cached_property
    def receiver(self) -> LanguageModel:
        return self._model("receiver")

    @cached_property
    def sharer(self) -> LanguageModel:
        return self._model("sharer")

    @cached_property
    def router(self) -> Router:
        router = Router(len(self.receiver.tokenizer))
        router.load_state_dict(load_file(self.path / "router.safetensors"))
        return router

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return json.loads((self.path / "provenance.json").read_text(encoding="utf-8"))

    @property
    def seeds(self) -> list[int]:
        """Training seeds of the fusers."""
        return sorted(int(folder.name.removeprefix("fuser-")) for folder in self.path.glob("fuser-*"))

    def fused(self, seed: int) -> CacheToCache:
        """Returns the two models with the fuser of a seed. Raises CheckpointError if there is none."""
        if seed not in self.seeds:
            known = ", ".join(map(str, self.seeds))
            raise CheckpointError(f"expected a seed of {known}, got {seed}; choose one of the fusers in {self.path}")
        # shipped as float16; CPUs are faster in float32
        fuser = load_fuser(self.path / f"fuser-{seed}", dtype=torch.float32)
        return CacheToCache(self.receiver, [self.sharer], [fuser])

    def save_router(self, router: Router) -> None:
        save_file(router.state_dict(), self.path / "router.safetensors")

    def save_provenance(self, record: dict[str, Any]) -> None:
        write_file(self.path / "provenance.json", json.dumps(record, indent=2) + "\n")

    def _model(self, role: str) -> LanguageModel:
        return LanguageModel.from_pretrained(self.path / role, dtype=torch.float32)
