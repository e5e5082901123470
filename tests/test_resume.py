"""A training run resumes by content: changed data, models, tokenizers, templates and settings are named and refused."""

import json
import os
import shutil

import pytest
from runs import write_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from kvfuse.errors import PairError, RecipeError
from kvfuse.language_model import LanguageModel
from kvfuse.training.loop.callbacks import Safeguards
from kvfuse.training.recipe import load_recipe
from kvfuse.training.run import dry_run, train


@pytest.fixture
def recipe(saved_models, tmp_path):
    shutil.copytree(saved_models, tmp_path / "models")
    sections = {"train": {"steps": 4, "batch_size": 4, "save_steps": 2}}
    return write_recipe(tmp_path, tmp_path / "models", [f"number {i}" for i in range(10)], **sections)


@pytest.fixture
def killed(recipe, monkeypatch):
    """The recipe of a run that was killed after its first checkpoint."""
    on_save = Safeguards.on_save

    def save_and_die(self, *args, **options):
        on_save(self, *args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Safeguards, "on_save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(recipe)
    return recipe


def run(recipe, *words, **options):
    said = []
    train(load_recipe(recipe, words), said.append, quiet=True, **options)
    return said


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def edit(path, change):
    path.write_text(change(path.read_text()))


def change_weight(path):
    tensors = load_file(path)
    next(iter(tensors.values())).flatten()[-1] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def change_tokenizer(folder, **changes):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in changes.items():
        setattr(tokenizer, name, value(getattr(tokenizer, name)))
    tokenizer.save_pretrained(folder)


def change_config(folder):
    edit(folder / "config.json", lambda text: json.dumps({**json.loads(text), "rms_norm_eps": 0.01}))


CHANGES = {
    "the data": lambda folder: edit(folder / "chats.jsonl", lambda text: text.replace("number 3", "number 9")),
    "the receiver's weights": lambda folder: change_weight(folder / "models/receiver/model.safetensors"),
    "the sharer's weights": lambda folder: change_weight(folder / "models/sharer/model.safetensors"),
    "the receiver's configuration": lambda folder: change_config(folder / "models/receiver"),
    "the sharer's chat template": lambda folder: change_tokenizer(
        folder / "models/sharer", chat_template=lambda text: "{{ '' }}" + text
    ),
    "the receiver's tokenizer": lambda folder: change_tokenizer(folder / "models/receiver", pad_token=lambda _: "é"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_content_is_named_and_nothing_is_written(killed, tmp_path, what):
    CHANGES[what](tmp_path)
    before = files(tmp_path / "out")
    for start in (run, lambda path: dry_run(load_recipe(path), lambda line: None)):
        with pytest.raises(RecipeError, match=rf"begun by another \(changed since: {what}\); .*--overwrite"):
            start(killed)
    assert files(tmp_path / "out") == before


def test_a_file_added_to_a_folder_of_data_is_a_change(recipe, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(tmp_path / "chats.jsonl", tmp_path / "data/a.jsonl")
    run(recipe, f"data.path={tmp_path / 'data'}")
    shutil.copy(tmp_path / "chats.jsonl", tmp_path / "data/b.jsonl")
    with pytest.raises(RecipeError, match="changed since: the data"):
        run(recipe, f"data.path={tmp_path / 'data'}")


def test_changed_settings_are_named_with_both_values(killed):
    with pytest.raises(RecipeError, match=r"fuser.hidden_dim 8 -> 16, train.learning_rate 0.0001 -> 0.01"):
        run(killed, "train.learning_rate=1e-2", "fuser.hidden_dim=16")


def test_what_changes_no_weight_may_change(killed, tmp_path):
    """Where files are, how they are written, and how the run is watched."""
    shutil.move(tmp_path / "models", tmp_path / "moved")
    edit(tmp_path / "chats.jsonl", lambda text: text + "\n\n")
    moved = [f"{role}={tmp_path / 'moved' / role}" for role in ("receiver", "sharer")]
    assert "2 steps" in run(killed, *moved, "data.max_bad_share=0.5")[-1], "resumed"


def test_a_finished_run_stays_as_it_is(recipe, tmp_path, monkeypatch):
    run(recipe)
    before = files(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "from_pretrained", None)  # nothing is loaded
        assert "is finished" in run(recipe)[-1]
    assert files(tmp_path / "out") == before
    assert json.loads((tmp_path / "out/result.json").read_text())["training"]["steps"] == 4


def test_a_run_killed_after_its_last_step_takes_no_other(recipe, tmp_path):
    """Four steps of an epoch and a half: Trainer would begin the second epoch again."""
    run(recipe, "train.steps=3", "train.save_steps=1")
    before = files(tmp_path / "out/fuser")
    (tmp_path / "out/result.json").unlink()
    assert "0 steps" in run(recipe, "train.steps=3", "train.save_steps=1")[-1]
    weights = tmp_path / "out/fuser/model.safetensors"
    assert weights.read_bytes() == before[weights]


def test_overwrite_starts_again(killed, tmp_path):
    CHANGES["the data"](tmp_path)
    assert "3 steps" in run(killed, "train.steps=3", overwrite=True)[-1]
    assert "is finished" in run(killed, "train.steps=3")[-1]
    assert os.listdir(tmp_path / "out/checkpoints") != ["checkpoint-2"]


def test_a_run_that_has_trained_nothing_may_begin_differently(recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("kvfuse.training.run.FuserTrainer", None)
        with pytest.raises(TypeError):
            run(recipe)
    assert (tmp_path / "out/recipe.yaml").exists()
    assert "2 steps" in run(recipe, "train.steps=2")[-1]


def test_a_run_of_an_earlier_version_goes_on(killed, tmp_path):
    (tmp_path / "out/train-inputs.json").unlink()
    assert "2 steps" in run(killed)[-1]
    assert (tmp_path / "out/train-inputs.json").exists()


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:99])])
def test_a_dry_run_refuses_weights_that_the_run_refuses(recipe, tmp_path, damage):
    damage(tmp_path / "models/sharer/model.safetensors")
    with pytest.raises(PairError, match="weights"):
        dry_run(load_recipe(recipe), lambda line: None)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.report_to=bogus", "report_to to be one of none, .*, got 'bogus'"),
        ("train.fsdp=true", "several processes"),
        ("output=/proc/x", "can be written"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(recipe, word, message):
    for start in (run, lambda path, word: dry_run(load_recipe(path, [word]), lambda line: None)):
        with pytest.raises(RecipeError, match=message):
            start(recipe, word)


def test_a_batch_larger_than_the_data_is_all_of_it(recipe):
    said = []
    plan = dry_run(load_recipe(recipe, ["train.batch_size=100000"]), said.append)
    assert said[-1] == "train.batch_size is 100,000: every batch has all 8 training examples"
    assert plan.memory == dry_run(load_recipe(recipe, ["train.batch_size=8"]), said.append).memory
    run(recipe, "train.batch_size=100000")
