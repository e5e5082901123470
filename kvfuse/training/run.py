"""``kvfuse train``: from a recipe to a fuser on disk, with what it gained over the receiver alone."""

import importlib.metadata
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import yaml
from accelerate import PartialState

from kvfuse.checkpoint import save_fuser, write_file
from kvfuse.errors import RecipeError
from kvfuse.fusers import Fuser, describe_gates, make_fuser
from kvfuse.language_model import LanguageModel
from kvfuse.model import CacheToCache
from kvfuse.training.closed_form import fit
from kvfuse.training.data import EncodedExample, encode, load_examples, split
from kvfuse.training.recipe import Recipe
from kvfuse.training.trainer import FuserTrainer, bits_per_response

VERSIONS_OF = ("kvfuse", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class Gain:
    """Bits per character of held-out responses, receiver alone and fused."""

    receiver: float
    fused: float
    examples: int

    def __str__(self) -> str:
        verdict = "beats the receiver alone" if self.fused < self.receiver else "does NOT beat the receiver alone"
        return (
            f"Held-out responses ({self.examples}): {self.receiver:.3f} bits per character for the receiver alone, "
            f"{self.fused:.3f} fused ({self.fused / self.receiver - 1:+.1%}). The fused receiver {verdict}."
        )


def train(recipe: Recipe, say: Callable[[str], None] = print, quiet: bool = False) -> Gain:
    """Run a recipe; a killed run, started again with the same recipe, goes on from its last checkpoint.

    Args:
        recipe: See :class:`Recipe`.
        say: Takes lines of progress.
        quiet: Show no progress bar.

    Returns:
        What the fuser gained on held-out examples.

    Raises:
        RecipeError, PairError, PromptError: Before anything is written.
    """
    examples = load_examples(recipe.data)
    pair = new_pair(recipe)
    trainable = sum(parameter.numel() for parameter in pair.fusers[0].parameters())
    frozen = sum(model.model.num_parameters() for model in (pair.receiver, *pair.sharers))
    say(f"trainable: {trainable:,} parameters of the fuser; frozen: {frozen:,} of receiver and sharer")
    training, held_out = ([encode(example, pair) for example in part] for part in split(examples, recipe.data.validation_share))
    _claim(recipe)
    if pair.fusers[0].solved:
        fit(pair, recipe.train, training)
    else:
        FuserTrainer(pair, recipe.train, training, recipe.output / "checkpoints", quiet).resume()
    pair.fusers[0].eval()
    gain = measure(pair, held_out, [len(example.response) for example in examples[-len(held_out) :]])
    save_fuser(pair.fusers[0], recipe.output / "fuser", f"## Measured\n\n{gain}\n\n## Recipe\n\n```yaml\n{_as_yaml(recipe)}```\n")
    write_file(recipe.output / "result.json", json.dumps({**asdict(gain), "versions": versions()}, indent=2) + "\n")
    say(str(gain))
    say(describe_gates(pair.fusers[0]))
    say(f"saved to {recipe.output / 'fuser'}")
    return gain


def new_pair(recipe: Recipe) -> CacheToCache:
    """Load both models and put a new fuser between them."""
    options = {"dtype": recipe.dtype, "device_map": PartialState().device}
    receiver, sharer = (LanguageModel.from_pretrained(name, **options) for name in (recipe.receiver, recipe.sharer))
    torch.manual_seed(recipe.train.seed)
    return CacheToCache(receiver, [sharer], [fuser_for(receiver, sharer, recipe)])


def fuser_for(receiver: LanguageModel, sharer: LanguageModel, recipe: Recipe) -> Fuser:
    """A new float32 fuser of the recipe's kind that remembers this pair."""
    identical = receiver.identity.tokenizer == sharer.identity.tokenizer
    alignment = recipe.token_alignment
    return make_fuser(
        recipe.fuser.kind,
        receiver=receiver.identity.to_dict(),
        sharer=sharer.identity.to_dict(),
        token_alignment=("identity" if identical else "span") if alignment == "auto" else alignment,
        **recipe.fuser.options,
    ).to(receiver.model.device)


def measure(pair: CacheToCache, examples: Sequence[EncodedExample], characters: Sequence[int]) -> Gain:
    """Bits per character of the responses, without and with the sharer's cache."""
    per_response = sum(characters) / len(characters)
    alone, fused = (bits_per_response(pair, examples, fused=fused) / per_response for fused in (False, True))
    if not math.isfinite(fused):
        raise RecipeError(f"expected a finite loss, got {fused}; train with a lower train.learning_rate")
    return Gain(alone, fused, len(examples))


def versions() -> dict[str, str]:
    """Of the libraries that decide a run's figures."""
    return {name: importlib.metadata.version(name) for name in VERSIONS_OF}


def _claim(recipe: Recipe) -> None:
    """Keep the recipe beside what it makes; refuse a folder that another recipe has started."""
    saved = recipe.output / "recipe.yaml"
    if saved.exists() and saved.read_text() != _as_yaml(recipe):
        raise RecipeError(
            f"expected {recipe.output} to be new or begun by this very recipe, got one begun by another; choose another output"
        )
    write_file(saved, _as_yaml(recipe))


def _as_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
