"""The recipes that are shipped: all can be read, and the published pairs' say what the paper says."""

import re
from pathlib import Path

import pytest
import torch

from kvfuse.fusers import fuser_class
from kvfuse.kv_cache import KVSpec
from kvfuse.published.pairs import PUBLISHED_PAIRS
from kvfuse.training.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
COMMANDS = re.findall(r"^.* train (recipes/\S+)(.*)$", (FOLDER.parent / "docs/training.md").read_text(), re.MULTILINE)
RECIPES = sorted(FOLDER.rglob("*.yaml"))
GPUS = 8
KV = {"receiver": KVSpec(28, 8, 128, 128), "sharer": KVSpec(24, 2, 64, 64)}  # of Qwen3-0.6B and Qwen2.5-0.5B-Instruct
PAPER = {  # section A.3.5: examples a step, steps, the longest example
    "general": (256, 1929, 2048),
    "mmlu": (128, 116, 1024),
    "long": (16, 118, 12000),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_right_and_opens_with_its_command(path):
    load_recipe(path)
    assert f"kvfuse{'.cli' * ('torchrun' in path.read_text().splitlines()[0])} train {path.relative_to(FOLDER.parent)}" in path.read_text()


@pytest.mark.parametrize(("path", "words"), COMMANDS)
def test_what_the_page_on_training_tells_to_run_is_right(path, words):
    load_recipe(FOLDER.parent / path, [word for word in words.split() if word != "--dry-run"])


@pytest.mark.parametrize("name", PAPER)
def test_a_published_recipe_is_the_papers(name):
    recipe = load_recipe(FOLDER / "published" / f"{name}.yaml")
    train, data = recipe.train, recipe.data
    assert (train.batch_size * train.accumulation * GPUS, train.steps, data.max_tokens) == PAPER[name]
    assert (train.learning_rate, train.gate_learning_rate, train.weight_decay, train.warmup) == (1e-4, 1e-4, 0.01, 0.1)
    assert (train.max_grad_norm, train.seed, data.validation_share) == (1.0, 42, 0.01)
    if data.limit:
        assert train.steps == pytest.approx(data.limit * 0.99 / PAPER[name][0], rel=0.01)  # one epoch, less what is too long


@pytest.mark.parametrize("name", PAPER)
def test_a_published_recipe_makes_the_published_fuser(name):
    recipe = load_recipe(FOLDER / "published" / f"{name}.yaml")
    pair = next(one for one in PUBLISHED_PAIRS if (one.receiver, one.sharer) == (recipe.receiver, recipe.sharer))
    cls = fuser_class(recipe.fuser.kind)
    known = {whose: {"name": whose, "kv": vars(kv)} for whose, kv in KV.items()}
    with torch.device("meta"):
        fuser = cls(cls.config_class(**known, **recipe.fuser.options))
    assert sum(parameter.numel() for parameter in fuser.parameters()) == pair.parameters
    assert fuser.config.dropout == 0.1
