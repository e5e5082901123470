"""A run that is killed, runs out of something or diverges loses nothing that was whole."""

import errno
import signal
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from helpers import assert_same_tensors
from runs import ENVIRONMENT, write_recipe
from safetensors.torch import load_file
from transformers import TrainerCallback

from kvfuse.errors import RecipeError
from kvfuse.model import CacheToCache
from kvfuse.testing import tiny_fuser
from kvfuse.training.data.columns import to_columns
from kvfuse.training.data.encoding import Encoder
from kvfuse.training.data.examples import Example
from kvfuse.training.loop.callbacks import WHOLE, last_whole_checkpoint
from kvfuse.training.loop.trainer import FuserTrainer
from kvfuse.training.recipe import TrainSection

KILLED_WHILE_SAVING = """
import os, signal, sys
from transformers import Trainer
from kvfuse.training.recipe import load_recipe
from kvfuse.training.run import train

save, count = Trainer._save_optimizer_and_scheduler, 0

def killed(self, folder):
    global count
    count += 1
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # the fuser is written, the optimizer is not
    save(self, folder)

if sys.argv[1] == "kill":
    Trainer._save_optimizer_and_scheduler = killed
train(load_recipe("recipe.yaml", ["output=" + sys.argv[2]]), quiet=True)
"""


@pytest.fixture
def trainer(receiver, sharer, tmp_path):
    pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, zero_init=True)])
    rows = [to_columns(Encoder.of(pair).encode(Example(f"What is {i}?", f"It is {i}."))) for i in range(4)]
    section = TrainSection(steps=4, batch_size=2, learning_rate=1e-2, save_steps=2)
    return FuserTrainer(pair, section, Dataset.from_list(rows), tmp_path / "checkpoints", quiet=True)


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_save_ends_with_the_same_weights(saved_models, tmp_path):
    train = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "save_steps": 2}
    write_recipe(
        tmp_path, saved_models, [f"It is {i}." for i in range(8)], data={"validation_share": 0.25}, train=train
    )

    def run(mode, output):
        command = [sys.executable, "-c", KILLED_WHILE_SAVING, mode, output]
        return subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)

    assert run("kill", "killed").returncode == -signal.SIGKILL
    half = tmp_path / "killed/checkpoints/checkpoint-4"
    assert half.is_dir()
    assert not (half / WHOLE).exists()
    for output in ("killed", "whole"):
        ran = run("go on", output)
        assert ran.returncode == 0, ran.stderr
    ended = [load_file(tmp_path / output / "fuser/model.safetensors") for output in ("killed", "whole")]
    assert_same_tensors(*ended)


def test_only_whole_checkpoints_are_resumed_from(tmp_path):
    assert last_whole_checkpoint(tmp_path / "none") is None
    for step, whole in ((9, True), (10, True), (100, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / WHOLE).touch()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / "checkpoint-100").exists()


def test_weights_that_are_not_finite_are_not_saved(trainer, tmp_path):
    class Diverge(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                next(model.parameters()).data.fill_(float("nan"))

    trainer.add_callback(Diverge())
    with pytest.raises(RecipeError, match=r"step 4.*learning_rate"):
        trainer.resume()
    assert last_whole_checkpoint(tmp_path / "checkpoints") == str(tmp_path / "checkpoints/checkpoint-2")


def test_a_shortage_of_memory_is_explained_in_one_line(trainer):
    class RunOut(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise torch.OutOfMemoryError("no more")

    trainer.add_callback(RunOut())
    with pytest.raises(RecipeError, match="batch_size"):
        trainer.resume()


def test_other_errors_are_left_alone(trainer):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise OSError(errno.EIO, "broken")

    trainer.add_callback(Break())
    with pytest.raises(OSError, match="broken"):
        trainer.resume()
