"""Who is asked: a recipe's models, its fusers, and the methods made of them."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from kvfuse.checkpoint import load_fuser
from kvfuse.errors import EvaluationError, first_line
from kvfuse.evaluation.recipe import EvaluationRecipe
from kvfuse.evaluation.tasks.readouts import without_choices
from kvfuse.language_model import LanguageModel
from kvfuse.methods import Method, Router, make_method
from kvfuse.model import CacheToCache
from kvfuse.prompts.chat import Message
from kvfuse.support.processes import processes


@dataclass
class Models:
    """The models of a pair, loaded once, and its fusers one seed at a time."""

    recipe: EvaluationRecipe

    def __post_init__(self) -> None:
        section = self.recipe.evaluation
        self._options = {"dtype": self.recipe.dtype, "device_map": processes().device}
        self._first = CacheToCache.from_pretrained(
            self.recipe.receiver,
            self.recipe.sharer,
            self.recipe.fusers()[0],
            section.subfolder,
            section.fusion,
            **self._options,
        )

    def pair(self, seed: int) -> CacheToCache:
        """With the fuser of a seed, or where there are several sharers the fusers."""
        if seed == 0:
            return self._first
        section, first = self.recipe.evaluation, self._first
        sources = _as_list(self.recipe.fusers()[seed])
        subfolders = [section.subfolder] * len(sources) if isinstance(section.subfolder, str) else section.subfolder
        fusers = [load_fuser(source, inside) for source, inside in zip(sources, subfolders, strict=True)]
        for fuser, one in zip(fusers, first.fusers, strict=True):
            fuser.to(one.device, one.dtype)
        return CacheToCache(first.receiver, first.sharers, fusers, section.fusion)


def methods_of(recipe: EvaluationRecipe, pair: CacheToCache, seed: int) -> list[Method]:
    """All methods of a recipe with the fuser of a seed; of later seeds those that fuse.

    Raises:
        EvaluationError: The router or the examples cannot be read.
        MethodError: A method lacks something.
    """
    section = recipe.evaluation
    settings = {"without_options": without_choices, **section.settings}
    if "router" in settings:
        settings["router"] = _load_router(settings["router"], pair.receiver)
    if section.examples is not None:
        settings["examples"] = _read_examples(section.examples, section.shots)
    methods = [make_method(name, pair, **settings) for name in section.methods]
    return [method for method in methods if seed == 0 or method.fuses]


def _load_router(path: str | Path, receiver: LanguageModel) -> Router:
    try:
        router = Router(len(receiver.tokenizer))
        router.load_state_dict(load_file(path))
    except (OSError, RuntimeError) as error:
        raise EvaluationError(
            f"expected a router for {receiver.name} at {path}, got: {first_line(error)}; train one"
        ) from error
    return router


def _read_examples(path: Path, shots: int) -> list[Message]:
    """The first examples of a file, as turns of a chat."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:shots]]
        turns = [
            ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]})
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"expected lines with prompt and response in {path}, got: {error}; correct the file"
        ) from error
    return [message for turn in turns for message in turn]


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
