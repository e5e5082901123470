"""The benchmarks' own files through tiny models, end to end; accuracy is chance, everything else is as it would be."""

import json

import pytest
import yaml

pytest.importorskip("lm_eval")

from kvfuse.checkpoint import save_fuser
from kvfuse.evaluation.predictions import read_run
from kvfuse.evaluation.recipe import load_evaluation
from kvfuse.evaluation.run import evaluate
from kvfuse.testing import tiny_fuser, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
LONG = {"max_position_embeddings": 8192}
GENERATE = ["mmlu_redux_generate", "openbookqa_generate", "arc_challenge_generate", "ceval_generate", "gsm8k_generate"]
OPTIONS = ["openbookqa_options", "arc_challenge_options"]
ASKED = ["text-to-text", "cache-to-cache", "mismatched", "calibrated"]
COUNTS = {"openbookqa_options": 500, "arc_challenge_options": 1150}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    receiver, sharer = tiny_model("qwen3", **LONG), tiny_model("llama", tiny_tokenizer(300, "lines"), **LONG)
    for name, one in (("receiver", receiver), ("sharer", sharer)):
        one.model.save_pretrained(folder / name)
        one.tokenizer.save_pretrained(folder / name)
    save_fuser(tiny_fuser(receiver, sharer), folder / "fuser")
    section = {"fusers": [str(folder / "fuser")], "tasks": ["openbookqa_options"], "timed": 0}
    content = {"receiver": str(folder / "receiver"), "sharer": str(folder / "sharer"), "evaluation": section}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def run(recipe, shared, out, tasks, methods, *words):
    words = [
        f"evaluation.tasks={json.dumps(tasks)}",
        f"evaluation.methods={json.dumps(methods)}",
        f"evaluation.data={shared / 'data'}",
        *words,
    ]
    evaluate(load_evaluation(recipe, words), out, lambda line: None, quiet=True)
    return read_run(out), json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("tasks", "methods"),
    [
        (["mmlu_redux_generate", "openbookqa_options"], ["receiver", "cache-to-cache", "mismatched"]),
        pytest.param([*GENERATE, *OPTIONS], ["receiver", *ASKED], marks=pytest.mark.slow),
    ],
    ids=["two files", "every file"],
)
def test_files_are_asked_end_to_end(recipe, shared, tmp_path, tasks, methods):
    words = ["evaluation.limit=3", "evaluation.timed=1", "evaluation.settings={hint_tokens: 4, sees_options: false}"]
    found, metrics = run(recipe, shared, tmp_path / "out", tasks, methods, *words)
    assert {(row.task, row.method) for row in found.predictions} == {
        (task, method) for task in tasks for method in methods
    }
    assert len(found.predictions) == 3 * len(methods) * len(tasks)
    assert not [row.failed for row in found.predictions if row.failed]
    for row in found.predictions:
        if "gsm8k" not in row.task:
            assert all(f"\n{letter}. " in row.question for letter in "ABCD"), "every option is in the prompt"
            assert row.target in "ABCDE"
        if row.task in OPTIONS:
            assert row.extracted in "ABCDE"
    for task in metrics["tasks"].values():
        assert task["items"] == 3
        for method in task["methods"].values():
            low, high = method["interval"]
            assert 0 <= low <= method["accuracy"] <= high <= 1
    assert set(metrics["latency"]) == set(methods)


@pytest.mark.slow
def test_all_questions_of_two_files_are_asked(recipe, shared, tmp_path):
    found, metrics = run(
        recipe, shared, tmp_path / "out", OPTIONS, ["receiver", "cache-to-cache"], "evaluation.batch_size=16"
    )
    for task, count in COUNTS.items():
        assert metrics["tasks"][task]["items"] == count
        items = [row.item for row in found.predictions if (row.task, row.method) == (task, "receiver")]
        assert len(set(items)) == count
    assert not [row.failed for row in found.predictions if row.failed]
