"""Build a recipe's models, fusers and methods."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from kvfuse.checkpoint import load_fuser
from kvfuse.errors import EvaluationError, first_line
from kvfuse.evaluation.recipe import EvaluationRecipe
from kvfuse.language_model import LanguageModel
from kvfuse.methods import Method, Router, Unfused, make_method
from kvfuse.model import CacheToCache
from kvfuse.prompts.messages import Message
from kvfuse.prompts.multiple_choice import without_choices
from kvfuse.support.files import read_text
from kvfuse.support.processes import processes


@dataclass
class Models:
    """The models of a pair, loaded once, and its fusers, loaded one seed at a time, where a fuser is needed.

    Attributes:
        fuse: Whether there are fusers.
        num_seeds: Number of training seeds; 1 without a fuser.
    """

    recipe: EvaluationRecipe

    def __post_init__(self) -> None:
        recipe, section = self.recipe, self.recipe.evaluation
        options = {"dtype": recipe.dtype, "device_map": processes().device, **asdict(recipe.chat_options)}
        self.fuse, self._first = recipe.fuse, self._load_alone(options) if not recipe.fuse else None
        self.num_seeds = len(recipe.fusers()) if recipe.fuse else 1
        if recipe.fuse:
            self._fused = CacheToCache.from_pretrained(
                recipe.receiver, recipe.sharer, recipe.fusers()[0], section.subfolder, section.fusion, **options
            )

    def pair(self, seed: int) -> CacheToCache | Unfused:
        """Returns the models with the fuser of a seed, or with a fuser for each of several sharers."""
        if self._first is not None:
            return self._first
        first = self._fused
        if seed == 0:
            return first
        fusers = [load_fuser(source, inside) for source, inside in self.sources(seed)]
        # the models are already placed, so new fusers follow those of the first seed
        for fuser, loaded in zip(fusers, first.fusers, strict=True):
            fuser.to(loaded.device, loaded.dtype)
        return CacheToCache(first.receiver, first.sharers, fusers, self.recipe.evaluation.fusion)

    def sources(self, seed: int) -> list[tuple[str, str]]:
        """Returns folder or Hub id, and the folder in it, of each fuser of a seed."""
        sources, inside = self.recipe.fusers()[seed], self.recipe.evaluation.subfolder
        sources = [sources] if isinstance(sources, str) else sources
        return list(zip(sources, [inside] * len(sources) if isinstance(inside, str) else inside, strict=True))

    def _load_alone(self, options: dict[str, Any]) -> Unfused:
        sharers = [self.recipe.sharer] if isinstance(self.recipe.sharer, str) else self.recipe.sharer or []
        load = LanguageModel.from_pretrained
        return Unfused(load(self.recipe.receiver or "", **options), [load(name, **options) for name in sharers])


def methods_of(recipe: EvaluationRecipe, pair: CacheToCache | Unfused, seed: int) -> list[Method]:
    """Returns a recipe's methods with the fuser of a seed: all for the first seed, those that fuse for later ones.

    Raises:
        EvaluationError: The router or the examples cannot be read.
        MethodError: A method lacks something.
    """
    section = recipe.evaluation
    # files of the recipe -> objects
    settings = {"without_options": without_choices, **section.settings}
    if "router" in settings:
        settings["router"] = _load_router(settings["router"], pair.receiver)
    if section.examples is not None:
        settings["examples"] = read_examples(section.examples, section.shots)
    methods = [make_method(name, pair, **settings) for name in section.methods]
    return [method for method in methods if seed == 0 or method.fuses]


def _load_router(path: str | Path, receiver: LanguageModel) -> Router:
    router = Router(len(receiver.tokenizer))
    try:
        router.load_state_dict(load_file(path))
    except (OSError, RuntimeError) as error:
        raise EvaluationError(
            f"expected a router for {receiver.name} at {path}, got: {first_line(error)}; train one"
        ) from error
    return router


def read_examples(path: Path, shots: int) -> list[Message]:
    """Returns the first examples of a file as turns of a chat. Raises EvaluationError: They cannot be read."""
    messages: list[Message] = []
    try:
        for line in read_text(path).splitlines()[:shots]:
            row = json.loads(line)
            messages.append({"role": "user", "content": row["prompt"]})
            messages.append({"role": "assistant", "content": row["response"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"expected lines with prompt and response in {path}, got: {error}; correct the file"
        ) from error
    return messages
