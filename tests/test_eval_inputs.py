"""Answers of an evaluation are never mixed: every input of an answer is compared by content, and named if changed."""

import json
import logging
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

pytest.importorskip("lm_eval")

from kvfuse.demo.pair_folder import SHIPPED
from kvfuse.errors import EvaluationError, MethodError, RecipeError
from kvfuse.evaluation.predictions import CONFIG, PREDICTIONS, append, read_predictions
from kvfuse.evaluation.recipe import load_evaluation
from kvfuse.evaluation.report.write import write_report
from kvfuse.evaluation.run import evaluate
from kvfuse.language_model import LanguageModel
from kvfuse.methods import METHODS, WITHOUT_FUSER, MethodContext, Router, Unfused, make_method
from kvfuse.model import CacheToCache
from kvfuse.support.run_folder import claim

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.usefixtures("undrawn"),
]
QUESTIONS = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(3)]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A folder with models, a fuser, questions, a template, examples, a router, and an evaluation of all of them."""
    folder = tmp_path_factory.mktemp("asked")
    for name in ("receiver", "sharer", "fuser-0"):
        shutil.copytree(SHIPPED / name, folder / name)
    (folder / "gsm8k").mkdir()
    (folder / "gsm8k/test.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "template.jinja").write_text("{{ question }}")
    (folder / "examples.jsonl").write_text('{"prompt": "1 + 1?", "response": "2"}\n{"prompt": "a", "response": "b"}\n')
    save_router(folder / "router.safetensors", 0.0)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_in(folder)))
    run(folder)
    return folder


@pytest.fixture
def folder(asked, tmp_path, monkeypatch):
    """A copy of it, which the recipe names: it is identified by content, wherever it is."""
    shutil.copytree(asked, tmp_path / "copy")
    (tmp_path / "copy/recipe.yaml").write_text(yaml.safe_dump(recipe_in(tmp_path / "copy")))
    return tmp_path / "copy"


def recipe_in(folder):
    section = {
        "fusers": [str(folder / "fuser-0")],
        "tasks": ["gsm8k_generate"],
        "methods": ["receiver", "few-shot", "routing", "cache-to-cache"],
        "data": str(folder),
        "template": str(folder / "template.jinja"),
        "examples": str(folder / "examples.jsonl"),
        "shots": 1,
        "settings": {"router": str(folder / "router.safetensors")},
        "max_new_tokens": 2,
        "timed": 0,
    }
    models = {role: str(folder / role) for role in ("receiver", "sharer")}
    return {**models, "dtype": "float32", "evaluation": section}


def run(folder, *words, **options):
    said = []
    evaluate(load_evaluation(folder / "recipe.yaml", words), folder / "out", said.append, quiet=True, **options)
    return said


def save_router(path, value):
    router = Router(len(LanguageModel.from_pretrained(SHIPPED / "receiver").tokenizer))
    save_file({name: tensor + value for name, tensor in router.state_dict().items()}, path)


def change_weight(path):
    tensors = load_file(path)
    max(tensors.values(), key=len).flatten()[1] += 1  # not one of those that a fuser remembers
    save_file(tensors, path, metadata={"format": "pt"})


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


CHANGES = {
    "the receiver's weights": lambda folder: change_weight(folder / "receiver/model.safetensors"),
    "the sharer's chat template": lambda folder: edit(folder / "sharer/chat_template.jinja", "{", "{{ '' }}{"),
    "the receiver's configuration": lambda folder: edit(
        folder / "receiver/generation_config.json", "{", '{"top_k": 9,'
    ),
    "the fuser of seed 0": lambda folder: change_weight(folder / "fuser-0/model.safetensors"),
    "the questions of gsm8k_generate": lambda folder: edit(folder / "gsm8k/test.jsonl", "What is 2", "What is 5"),
    "the template": lambda folder: edit(folder / "template.jinja", "{{ question }}", "Now: {{ question }}"),
    "the examples": lambda folder: edit(folder / "examples.jsonl", "1 + 1", "1 + 2"),
    "the router": lambda folder: save_router(folder / "router.safetensors", 1.0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_content_is_named_and_no_answer_is_added(folder, what):
    answers = (folder / "out" / PREDICTIONS).read_bytes()
    half = answers[: len(answers) // 2]
    (folder / "out" / PREDICTIONS).write_bytes(half)
    CHANGES[what](folder)
    with pytest.raises(EvaluationError, match=rf"begun by another \(changed since: {what}\); .*--overwrite"):
        run(folder)
    assert (folder / "out" / PREDICTIONS).read_bytes() == half


def test_the_same_content_elsewhere_asks_nothing_again(folder):
    edit(folder / "examples.jsonl", '"a"', '"an example that is not read"')
    assert not any("cache-to-cache" in line for line in run(folder)[:-2])


def test_changed_settings_are_named_before_a_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("kvfuse.evaluation.run.Models", None)
    with pytest.raises(EvaluationError, match=r"evaluation.limit None -> 2"):
        run(folder, "evaluation.limit=2")
    with pytest.raises(EvaluationError, match=r"evaluation.settings.share None -> 0.5"):
        run(folder, "evaluation.settings.share=0.5")


def test_overwrite_starts_again(folder):
    CHANGES["the template"](folder)
    run(folder, "evaluation.limit=2", overwrite=True)
    assert len(read_predictions(folder / "out" / PREDICTIONS)) == 2 * 4


def test_a_folder_of_an_earlier_version_is_reported_and_continued(folder):
    (folder / "out/eval-inputs.json").unlink()
    write_report(folder / "out")
    rows = read_predictions(folder / "out" / PREDICTIONS)
    (folder / "out" / PREDICTIONS).unlink()
    append(folder / "out" / PREDICTIONS, rows[:6])
    saved = yaml.safe_load((folder / "out" / CONFIG).read_text())
    (folder / "out" / CONFIG).write_text(
        yaml.safe_dump({**recipe_in(folder), "fuser": saved["fuser"], "published": []})
    )
    with pytest.raises(EvaluationError, match="changed since: fuser"):
        run(folder)
    (folder / "out" / CONFIG).write_text(
        yaml.safe_dump({**recipe_in(folder), "fuser": [str(folder / "fuser-0")], "published": []})
    )
    run(folder)
    assert {row.key for row in read_predictions(folder / "out" / PREDICTIONS)} == {row.key for row in rows}


def test_one_evaluation_at_a_time_and_only_where_it_can_write(folder, tmp_path):
    with claim(folder / "out", EvaluationError), pytest.raises(EvaluationError, match="one run at a time"):
        run(folder)
    recipe = load_evaluation(folder / "recipe.yaml")
    for out in (tmp_path / "copy/recipe.yaml/out", "/proc/x"):
        for smoke in (False, True):
            with pytest.raises(EvaluationError, match="can be written"):
                evaluate(recipe, type(tmp_path)(out), print, quiet=True, smoke=smoke)


def test_methods_that_fuse_nothing_need_no_fuser(folder):
    shutil.rmtree(folder / "fuser-0")
    shutil.rmtree(folder / "out")
    words = ["evaluation.fusers=[]", "evaluation.methods=[receiver,sharer,text-to-text]", "evaluation.template=null"]
    run(folder, *words)
    assert {row.method for row in read_predictions(folder / "out" / PREDICTIONS)} == {
        "receiver",
        "sharer",
        "text-to-text",
    }
    with pytest.raises(RecipeError, match="receiver and sharer for methods that fuse nothing"):
        run(folder, *words, "sharer=null", overwrite=True)
    with pytest.raises(RecipeError, match=r"expected evaluation\.fusers"):
        run(folder, *words, "evaluation.methods=[cache-to-cache]", overwrite=True)


def test_the_methods_without_a_fuser_are_those_that_fuse_nothing(pair):
    options = {"examples": [{"role": "user", "content": "a"}], "router": Router(len(pair.receiver.tokenizer))}
    assert {name for name in METHODS if not make_method(name, pair, **options).fuses} == WITHOUT_FUSER
    alone = Unfused(pair.receiver, pair.sharers)
    assert all(make_method(name, alone, **options).name == name for name in WITHOUT_FUSER)
    with pytest.raises(MethodError, match="expected a fuser"):
        make_method("cache-to-cache", alone)
    assert isinstance(MethodContext(models=pair).pair, CacheToCache)


def test_the_harness_says_nothing_about_its_own_options(folder, caplog):
    from kvfuse.evaluation.tasks import load_task

    with caplog.at_level(logging.WARNING):
        load_task("gsm8k_generate", folder)
        logging.getLogger("lm_eval.api.task").warning("another")
    assert [record.message for record in caplog.records] == ["another"]
