"""A run of ``kvfuse eval``, whole, killed and started again, and refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import IN_TWO

pytest.importorskip("lm_eval")

from kvfuse.cli import app
from kvfuse.demo.pair_folder import SHIPPED
from kvfuse.errors import EvaluationError, MethodError, RecipeError
from kvfuse.evaluation.predictions import LATENCY, PREDICTIONS, read_predictions, read_run, read_timings
from kvfuse.evaluation.recipe import CONTROLS, load_evaluation
from kvfuse.evaluation.run import evaluate
from kvfuse.methods import METHODS

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture
def recipe(tmp_path):
    """The embedded pair asked a few questions, as YAML."""
    section = {
        "fusers": [str(SHIPPED / "fuser-0"), str(SHIPPED / "fuser-1")],
        "tasks": ["embedded_generate"],
        "methods": ["receiver", "cache-to-cache", "mismatched"],
        "limit": 12,
        "batch_size": 12,
        "timed": 2,
    }
    content = {
        "receiver": str(SHIPPED / "receiver"),
        "sharer": str(SHIPPED / "sharer"),
        "dtype": "float32",
        "evaluation": section,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(recipe, out, *words):
    said = []
    evaluate(load_evaluation(recipe, words), out, said.append, quiet=True)
    return said


def test_a_run_leaves_answers_timings_and_reports(recipe, tmp_path):
    said = run(recipe, tmp_path / "out")
    found = read_run(tmp_path / "out")
    asked = {(row.method, row.seed) for row in found.predictions}
    assert asked == {
        ("receiver", None),
        *((name, seed) for name in ("cache-to-cache", "mismatched") for seed in (0, 1)),
    }
    assert len(found.predictions) == 12 * len(asked)
    assert {row.method for row in found.timings} == {"receiver", "cache-to-cache", "mismatched"}
    phases = {row.method: row.phases for row in found.timings}
    assert {"receiver_prefill", "sharer_prefill", "fuse"} <= phases["cache-to-cache"].keys()
    right = {
        method: sum(row.score for row in found.predictions if row.method == method)
        for method in ("receiver", "cache-to-cache")
    }
    assert right["cache-to-cache"] / 2 > right["receiver"], "the shipped fusers work"
    assert {row.target for row in found.predictions if row.score == 1} == {
        row.answer for row in found.predictions if row.score == 1
    }
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.yaml", "eval-inputs.json", "versions.json", PREDICTIONS, LATENCY,
        "metrics.json", "report.html", "report.md",
    }  # fmt: skip
    assert "No verdict from 12 items" in said[-2], "too few for one"
    assert run(recipe, tmp_path / "out")[:-2] == [], "nothing is asked twice"


def test_a_killed_run_goes_on_and_asks_nothing_twice(recipe, tmp_path, monkeypatch):
    from kvfuse.methods import Fused

    reply, asked = Fused.reply, []

    def counted(self, prompts, **options):
        if len(asked) == 8:
            raise KeyboardInterrupt
        asked.extend(str(prompt) for prompt in prompts)
        return reply(self, prompts, **options)

    words = ["evaluation.batch_size=4", "evaluation.methods=[receiver,cache-to-cache]", "evaluation.timed=0"]
    monkeypatch.setattr(Fused, "reply", counted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "killed", *words)
    assert len(read_predictions(tmp_path / "killed" / PREDICTIONS)) == 12, "the receiver's"
    before = set(asked)
    asked.append("no more than eight are counted")
    asked_again = []
    monkeypatch.setattr(
        Fused, "reply", lambda self, prompts, **o: asked_again.extend(map(str, prompts)) or reply(self, prompts, **o)
    )
    run(recipe, tmp_path / "killed", *words)
    first_seed = asked_again[: len(asked_again) - 12]
    assert len(first_seed) == 4
    assert not before & set(first_seed)
    monkeypatch.setattr(Fused, "reply", reply)
    run(recipe, tmp_path / "whole", *words)
    whole, resumed = (
        {row.key: row for row in read_predictions(tmp_path / name / PREDICTIONS)} for name in ("whole", "killed")
    )
    assert whole == resumed


def test_a_run_into_the_folder_of_another_recipe_is_refused(recipe, tmp_path):
    run(recipe, tmp_path / "out", "evaluation.methods=[receiver]", "evaluation.timed=0")
    with pytest.raises(EvaluationError, match="begun by another"):
        run(recipe, tmp_path / "out", "evaluation.methods=[sharer]")


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        (["evaluation.tasks=[embeded]"], EvaluationError, "did you mean 'embedded_generate'"),
        (["evaluation.methods=[reciever]"], MethodError, "did you mean 'receiver'"),
        (["evaluation.limt=3"], RecipeError, "did you mean 'limit'"),
        (["evaluation.settings={hint_token: 3}"], MethodError, "did you mean 'hint_tokens'"),
        (
            ["evaluation.settings={router: nowhere}", "evaluation.methods=[routing]"],
            EvaluationError,
            "expected a router",
        ),
        (["evaluation.examples=nowhere"], EvaluationError, "prompt and response"),
        (["evaluation.template=nowhere"], EvaluationError, "Jinja"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_asked(recipe, tmp_path, words, error, told):
    with pytest.raises(error, match=told):
        run(recipe, tmp_path / "out", *words)
    assert not (tmp_path / "out" / PREDICTIONS).exists()


def test_an_item_that_fails_is_counted_and_shown(recipe, tmp_path, monkeypatch):
    from kvfuse.methods import Single

    reply = Single.reply

    def broken(self, prompts, **options):
        if any("Berl" in str(prompt) or "Bielefeld" in str(prompt) for prompt in prompts):
            raise ValueError("cannot read this")
        return reply(self, prompts, **options)

    monkeypatch.setattr(Single, "reply", broken)
    run(recipe, tmp_path / "out", "evaluation.methods=[receiver,sharer]", "evaluation.timed=0")
    failed = [row for row in read_predictions(tmp_path / "out" / PREDICTIONS) if row.failed]
    assert failed
    assert {(row.score, row.failed) for row in failed} == {(0.0, "ValueError: cannot read this")}
    assert "cannot read this" in (tmp_path / "out" / "report.md").read_text()


def test_every_control_has_a_flag():
    import inspect

    flags = inspect.signature(next(one.callback for one in app.registered_commands if one.name == "eval")).parameters
    assert {name.replace("-", "_") for name in CONTROLS} <= flags.keys()
    assert set(CONTROLS) <= METHODS.keys()


def test_several_pairs_are_set_side_by_side(recipe, tmp_path):
    pairs = [{"name": f"seed-{seed}", "fusers": [str(SHIPPED / f"fuser-{seed}")]} for seed in (0, 1)]
    pairs.append({"name": "unpublished", "why_not": "Nobody has published its fuser."})
    words = [
        f"evaluation.pairs={json.dumps(pairs)}",
        "evaluation.timed=0",
        "evaluation.methods=[receiver,cache-to-cache]",
    ]
    said = run(recipe, tmp_path / "out", *words)
    assert "unpublished: not run. Nobody has published its fuser." in said
    page = (tmp_path / "out" / "report.md").read_text()
    assert "seed-1 minus seed-0" in page
    assert "not of the same" not in page


def test_timings_are_of_questions_spread_over_the_task(recipe, tmp_path):
    run(
        recipe,
        tmp_path / "out",
        "evaluation.methods=[receiver]",
        "evaluation.timed=3",
        "evaluation.fusers=[" + str(SHIPPED / "fuser-0") + "]",
    )
    assert [row.item for row in read_timings(tmp_path / "out" / LATENCY)] == ["0", "4", "8"]


@pytest.mark.slow
def test_two_processes_give_the_same_predictions(recipe, tmp_path):
    words = [str(recipe), "evaluation.timed=0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for out, start in (("one", [sys.executable]), ("two", IN_TWO)):
        command = [*start, "-m", "kvfuse.cli", "eval", *words, "--out", str(tmp_path / out)]
        subprocess.run(command, env=env, check=True, capture_output=True, text=True, cwd=ROOT)
    one, two = ({row.key: row for row in read_predictions(tmp_path / name / PREDICTIONS)} for name in ("one", "two"))
    assert one == two
