"""The recipes that are shipped: all can be read, and the published pairs' say what the paper says."""

import re
from pathlib import Path

import pytest
import torch

from kvfuse.cache.kv import KVSpec
from kvfuse.evaluation.recipe import load_evaluation
from kvfuse.evaluation.tasks import task_names
from kvfuse.fusers import fuser_class
from kvfuse.published.pairs import PUBLISHED_PAIRS, REPOSITORY
from kvfuse.training.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
TRAINING = (FOLDER.parent / "docs/training.md").read_text().replace("\\\n", "")  # continued lines joined
COMMANDS = re.findall(r"^.* train (recipes/\S+)(.*)$", TRAINING, re.MULTILINE)
EVALUATIONS = re.findall(
    r"^kvfuse eval (recipes/\S+) (.*)$", (FOLDER.parent / "docs/evaluation.md").read_text(), re.MULTILINE
)
PAPERS = sorted((FOLDER / "paper").glob("*.yaml"))
RECIPES = sorted(set(FOLDER.rglob("*.yaml")) - set(PAPERS))
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
    assert (
        f"kvfuse{'.cli' * ('torchrun' in path.read_text().splitlines()[0])} train {path.relative_to(FOLDER.parent)}"
        in path.read_text()
    )


@pytest.mark.parametrize(("path", "words"), COMMANDS)
def test_commands_of_the_page_on_training_are_valid(path, words):
    load_recipe(FOLDER.parent / path, [word for word in words.split() if word != "--dry-run"])


@pytest.mark.parametrize(("path", "words"), EVALUATIONS)
def test_commands_of_the_page_on_evaluation_are_valid(path, words):
    load_evaluation(FOLDER.parent / path, [word for word in words.split() if "=" in word])


@pytest.mark.parametrize("name", PAPER)
def test_a_published_recipe_is_the_papers(name):
    recipe = load_recipe(FOLDER / "published" / f"{name}.yaml")
    train, data = recipe.train, recipe.data
    assert (train.batch_size * train.accumulation * GPUS, train.steps, data.max_tokens) == PAPER[name]
    assert (train.learning_rate, train.gate_learning_rate, train.weight_decay, train.warmup) == (1e-4, 1e-4, 0.01, 0.1)
    assert (train.max_grad_norm, train.seed, data.validation_share) == (1.0, 42, 0.01)
    if data.limit:
        assert train.steps == pytest.approx(
            data.limit * 0.99 / PAPER[name][0], rel=0.01
        )  # one epoch, less what is too long


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


def papers_runs():
    """Every pair of every table: the recipe, why it cannot be run, and what is run."""
    for path in PAPERS:
        recipe = load_evaluation(path)
        for pair, run in zip(recipe.evaluation.pairs or [None], recipe.runs(), strict=True):
            yield pytest.param(pair.why_not if pair else "", run, id=f"{path.stem}-{pair.name if pair else 'all'}")


def test_the_papers_tables_are_there_and_open_with_their_command():
    assert {path.stem for path in PAPERS} == {f"table-{number}" for number in (3, 4, 5, 6, 7, 8, 9, 11, 13, 15)}
    for path in PAPERS:
        assert path.read_text().startswith(f"# kvfuse eval {path.relative_to(FOLDER.parent)} --out runs/{path.stem}\n")


@pytest.mark.parametrize(("why_not", "run"), list(papers_runs()))
def test_a_papers_pair_is_published_or_says_how_it_is_trained(why_not, run):
    sharers = run.sharer if isinstance(run.sharer, list) else [run.sharer]
    if why_not:
        path, words = re.search(r"kvfuse train (\S+\.yaml)(.*)$", why_not).groups()
        trained = load_recipe(FOLDER.parent / path, words.split())
        assert (trained.receiver, [trained.sharer], [str(trained.output / "fuser")]) == (
            run.receiver,
            sharers,
            run.fusers(),
        )
        fuser_class(trained.fuser.kind).config_class(
            **{whose: {"name": whose, "kv": vars(kv)} for whose, kv in KV.items()}, **trained.fuser.options
        )
    else:
        known = {(one.folder, one.receiver, one.sharer) for one in PUBLISHED_PAIRS}
        folders = run.evaluation.subfolder
        asked = zip(
            [folders] if isinstance(folders, str) else folders, [run.receiver] * len(sharers), sharers, strict=True
        )
        assert known.issuperset(asked)
        assert {one for seed in run.fusers() for one in ([seed] if isinstance(seed, str) else seed)} == {REPOSITORY}


@pytest.mark.parametrize(("why_not", "run"), list(papers_runs()))
def test_a_papers_figures_are_of_what_is_asked_or_say_why_not(why_not, run):
    section = run.evaluation
    assert {one.task for one in section.published} == set(section.tasks)
    assert set(section.tasks) <= set(task_names())
    for one in section.published:
        assert one.method in section.methods or one.why_not or one.unit != "%"
        assert one.unit != "%" or 0 < one.value < 100
        assert "2510.03215 v2, table" in one.source
        assert not why_not or one.method != "cache-to-cache" or one.unit != "%" or one.why_not == why_not
    assert {one.method for one in section.published} >= set(section.methods) - {"cascade", "receiver"}
