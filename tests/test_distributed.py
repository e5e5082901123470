"""Two processes on one machine train as one does: the same weights, one folder, resumed to the bit."""

import json
import subprocess

import pytest
import torch
from helpers import assert_same_tensors
from runs import ENVIRONMENT, IN_TWO, write_recipe
from safetensors.torch import load_file

from kvfuse.training.recipe import load_recipe
from kvfuse.training.run import train

pytestmark = pytest.mark.slow  # a process takes ten seconds and more to import what it trains with

RUN = """
import os, signal, sys
import kvfuse.training.run as run
from accelerate.state import AcceleratorState, DistributedType
from kvfuse.training.recipe import load_recipe
from kvfuse.training.loop.callbacks import Safeguards

def take_cpus_for_gpus():  # of CPUs, accelerate silently makes DDP
    start = AcceleratorState.__init__
    def init(self, *args, **options):
        start(self, *args, **options)
        self.fsdp_plugin = options.get("fsdp_plugin") or self.fsdp_plugin
        self.distributed_type = DistributedType.FSDP
    AcceleratorState.__init__, run.on_cpu = init, lambda: False

mark, first = Safeguards.on_save, os.environ["RANK"] == "0"

def mark_and_die(self, args, state, control, **kwargs):
    mark(self, args, state, control, **kwargs)
    if first:
        os.kill(os.getpid(), signal.SIGKILL)

if not first:
    run.write_file = run.save_fuser = None  # none but the first writes
modes, *words = sys.argv[1:]
if "fsdp" in modes:
    take_cpus_for_gpus()
if "kill" in modes:
    Safeguards.on_save = mark_and_die
run.train(load_recipe("recipe.yaml", words), say=lambda line: print(line, flush=True), quiet=True)
"""
PLAIN = ("fuser.gate=none", "fuser.dropout=0", "train.learning_rate=1e-3")


@pytest.fixture
def folder(saved_models, tmp_path, monkeypatch):
    write_recipe(
        tmp_path,
        saved_models,
        [f"It is number {i} of them"[: 8 + i] for i in range(20)],  # 16 to learn: all batches are whole
        train={"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "save_steps": 2},
    )
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write('\n{"prompt": "q", "response": ""}')
    (tmp_path / "run.py").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def two_processes(*words):
    env = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*IN_TWO, "run.py", *words], capture_output=True, text=True, env=env, timeout=300)


def weights(folder):
    return load_file(folder / "fuser/model.safetensors")


def test_two_processes_train_as_one_does_and_one_of_them_writes(folder):
    """Without dropout and gates, whose noise each process draws for itself."""
    ran = two_processes("", "output=two", *PLAIN)
    assert ran.returncode == 0, ran.stderr
    train(load_recipe("recipe.yaml", ["output=one", "train.batch_size=4", *PLAIN]), say=lambda line: None, quiet=True)
    one, two = weights(folder / "one"), weights(folder / "two")
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    results = [json.loads((folder / name / "result.json").read_text()) for name in ("one", "two")]
    assert [result["processes"] for result in results] == [1, 2]
    assert [result["training"]["tokens"] for result in results] == [results[0]["training"]["tokens"]] * 2
    assert results[1]["fused"] == pytest.approx(results[0]["fused"], rel=1e-4)
    assert results[1]["fused"] < results[1]["receiver"]
    assert [line.split()[0] for line in ran.stdout.splitlines()] == [
        "examples:",
        "trainable:",
        "Held-out",
        "The",
        "saved",
    ]
    assert len((folder / "two/bad_rows.jsonl").read_text().splitlines()) == 1


def test_two_killed_processes_end_with_the_same_weights(folder):
    """With dropout, gates, accumulation and a fused response; bit for bit."""
    words = ("fuser.fuse_response=true", "train.accumulation=2")
    assert two_processes("kill", "output=killed", *words).returncode != 0
    assert [path.name for path in (folder / "killed/checkpoints").iterdir()] == ["checkpoint-2"]
    for output in ("killed", "whole"):
        ran = two_processes("", f"output={output}", *words)
        assert ran.returncode == 0, ran.stderr
    killed, whole = weights(folder / "killed"), weights(folder / "whole")
    assert_same_tensors(killed, whole)


def test_a_fuser_spread_over_two_processes_trains_and_goes_on_as_copies_do(folder):
    """With dropout, gates, accumulation, a fused response, and so few held-out examples that one process has none."""
    words = ("fuser.fuse_response=true", "train.accumulation=2", "data.validation_share=0.01")
    assert two_processes("fsdp kill", "output=spread", "train.fsdp=true", *words).returncode != 0
    assert (folder / "spread/checkpoints/checkpoint-2/pytorch_model_fsdp.bin").exists(), "Trainer has spread it"
    for modes, output in (("fsdp", "spread"), ("", "copies")):
        ran = two_processes(modes, f"output={output}", f"train.fsdp={modes == 'fsdp'}", *words)
        assert ran.returncode == 0, ran.stderr
    copies, spread = weights(folder / "copies"), weights(folder / "spread")
    torch.testing.assert_close(spread, copies, rtol=1e-4, atol=1e-5)
