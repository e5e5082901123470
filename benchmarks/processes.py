"""How many tokens a second two processes learn, over one: DDP on the CPU, one thread each.

python -m benchmarks.processes [--shapes mid|true] [--batch 4] [--steps 4] [--json FILE]
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.pairs import random_pair
from benchmarks.rows import report, row
from benchmarks.training import TOKENS, random_example
from kvfuse.support.processes import processes
from kvfuse.training.data.columns import to_columns
from kvfuse.training.loop.trainer import FuserTrainer
from kvfuse.training.recipe import TrainSection


class _StepClock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def learn(shapes: str, batch: int, steps: int) -> float:
    """Tokens a second of all processes together, from the second step on."""
    group, clock = processes(), _StepClock()
    rows = Dataset.from_list([to_columns(random_example(seed)) for seed in range(batch * steps * group.num_processes)])
    train = TrainSection(steps=steps, batch_size=batch, learning_rate=1e-6)
    with tempfile.TemporaryDirectory() as folder:
        trainer = FuserTrainer(random_pair(shapes), train, rows, Path(folder, "checkpoints"), quiet=True)
        trainer.add_callback(clock)
        trainer.resume()
    seconds = statistics.median(after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False))
    return batch * TOKENS * group.num_processes / seconds


def launch(number: int, shapes: str, batch: int, steps: int) -> float:
    """:func:`learn` in so many processes."""
    words = ["--shapes", shapes, "--batch", str(batch), "--steps", str(steps), "--worker"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(number),
        "-m",
        "benchmarks.processes",
        *words,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return float(done.stdout.split()[-1])


def main(
    shapes: Annotated[
        str, typer.Option(help="mid (about 50M parameters each) or true (Qwen3-0.6B <- Qwen2.5-0.5B).")
    ] = "mid",
    batch: Annotated[int, typer.Option(help="Examples of a step and process.")] = 4,
    steps: Annotated[int, typer.Option(help="How many; the first is not counted.")] = 4,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
) -> None:
    """Measure and print."""
    if worker:
        torch.set_num_threads(1)
        speed = learn(shapes, batch, steps)
        if processes().is_main_process:
            print(speed)
        return
    one, two = (launch(number, shapes, batch, steps) for number in (1, 2))
    setting = f"{shapes}, batch {batch} a process"
    rows = [
        row("tokens a second, 1 process", setting, one, None, "1/s"),
        row("tokens a second, 2 processes", setting, two, None, "1/s"),
        row("2 processes / 1 process", setting, two / one, 1.7, "x"),
    ]
    report(rows, json_file)


if __name__ == "__main__":
    typer.run(main)
