"""``kvfuse eval --smoke`` runs every shipped recipe, downloads nothing, and cannot be taken for a result."""

import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lm_eval")
from kvfuse.errors import EvaluationError
from kvfuse.evaluation.recipe import EvaluationRecipe, load_evaluation
from kvfuse.evaluation.run import evaluate
from kvfuse.evaluation.smoke import NOTE, QUESTIONS, tiny

ROOT = Path(__file__).parents[1]
RECIPES = sorted(
    path for path in (ROOT / "recipes").rglob("*.yaml") if "evaluation" in yaml.safe_load(path.read_text())
)
QUICK = "table-13"  # several pairs, several sharers


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=() if path.stem == QUICK else pytest.mark.slow) for path in RECIPES]
)
def test_every_recipe_runs_to_its_last_line(path, tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(ROOT)
    recipe, said = load_evaluation(path), []
    evaluate(tiny(recipe, tmp_path), tmp_path, said.append, quiet=True)
    folders = [tmp_path / pair.name for pair in recipe.evaluation.pairs] or [tmp_path]
    assert not any("not run" in line for line in said)
    for folder, run in zip(folders, recipe.runs(), strict=True):
        check(folder, run)
    if len(folders) > 1:
        assert NOTE in (tmp_path / "report.md").read_text()
        assert " / " in (tmp_path / "report.md").read_text()


def check(folder, run):
    record, report = json.loads((folder / "metrics.json").read_text()), (folder / "report.md").read_text()
    assert record["note"] == NOTE
    assert f"**Note.** {NOTE}" in report
    assert NOTE in (folder / "report.html").read_text()
    assert record["tasks"].keys() == set(run.evaluation.tasks)
    for task in record["tasks"].values():
        assert task["items"] in (QUESTIONS, 13 * QUESTIONS)
        assert set(run.evaluation.methods) == task["methods"].keys()
        assert not any(one["failed"] for one in task["methods"].values())
        fused = task["methods"]["cache-to-cache"]
        assert len(fused["seeds"]) == len(run.fusers())
    for why_not in {one.why_not for one in run.evaluation.published if one.why_not}:
        assert why_not.replace("_", "\\_") in report or why_not in report


def test_its_folder_is_not_gone_on_with_in_earnest(tmp_path):
    recipe = EvaluationRecipe.model_validate(
        {"evaluation": {"fusers": ["f"], "tasks": ["gsm8k_generate"], "methods": ["receiver"], "timed": 0}}
    )
    small = tiny(recipe, tmp_path)
    evaluate(small, tmp_path, lambda line: None, quiet=True)
    in_earnest = small.model_copy(update={"evaluation": small.evaluation.model_copy(update={"note": ""})})
    with pytest.raises(EvaluationError, match="begun by another"):
        evaluate(in_earnest, tmp_path, lambda line: None)


def test_tasks_of_others_would_be_fetched(tmp_path):
    recipe = EvaluationRecipe.model_validate(
        {"evaluation": {"fusers": ["f"], "tasks": ["hellaswag"], "harness_tasks": True}}
    )
    with pytest.raises(EvaluationError, match="got 'hellaswag', whose data would be fetched"):
        tiny(recipe, tmp_path)
