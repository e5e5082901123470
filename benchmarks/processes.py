"""Tokens per second that two processes learn, over one: DDP on the CPU, one thread each.

python -m benchmarks.processes [--shapes mid|true] [--batch 4] [--steps 4] [--json FILE]
"""

import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from datasets import Dataset

from benchmarks.pairs import Shapes, random_pair
from benchmarks.rows import JsonFile, report, row
from benchmarks.timing import TrainerClock
from benchmarks.training import TOKENS, random_example
from kvfuse.support.processes import processes
from kvfuse.training.data.columns import to_columns
from kvfuse.training.loop.trainer import FuserTrainer
from kvfuse.training.recipe import TrainSection


def tokens_per_second(shapes: str, batch: int, steps: int) -> float:
    """Train in this process and its siblings; returns the speed of all together, from the second step on."""
    group, clock = processes(), TrainerClock()
    rows = Dataset.from_list([to_columns(random_example(seed)) for seed in range(batch * steps * group.num_processes)])
    train = TrainSection(steps=steps, batch_size=batch, learning_rate=1e-6)
    with tempfile.TemporaryDirectory() as folder:
        trainer = FuserTrainer(random_pair(shapes), train, rows, Path(folder, "checkpoints"), quiet=True)
        trainer.add_callback(clock)
        trainer.resume()
    # the median step, without the first, which sets up the processes
    seconds = statistics.median(end - start for start, end in pairwise(clock.steps))
    return batch * TOKENS * group.num_processes / seconds


def launch(num_processes: int, shapes: str, batch: int, steps: int) -> float:
    """Returns :func:`tokens_per_second` of several processes."""
    # this module again, as a worker in every process
    torchrun = f"-m torch.distributed.run --nproc-per-node {num_processes} -m benchmarks.processes"
    options = f"--shapes {shapes} --batch {batch} --steps {steps} --worker"
    command = [sys.executable, *torchrun.split(), *options.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return float(done.stdout.split()[-1])


def main(
    shapes: Shapes = "mid",
    batch: Annotated[int, typer.Option(help="Examples per step and process.")] = 4,
    steps: Annotated[int, typer.Option(help="Number of steps; the first is not counted.")] = 4,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure and print."""
    if worker:
        torch.set_num_threads(1)
        speed = tokens_per_second(shapes, batch, steps)
        if processes().is_main_process:
            print(speed)
        return
    # one process is launched too, so that both runs pay for the launcher
    one, two = (launch(num_processes, shapes, batch, steps) for num_processes in (1, 2))
    setting = f"{shapes}, batch {batch} a process"
    rows = [
        row("tokens a second, 1 process", setting, one, None, "1/s"),
        row("tokens a second, 2 processes", setting, two, None, "1/s"),
        row("2 processes / 1 process", setting, two / one, 1.7, "x"),
    ]
    report(rows, json_file)


if __name__ == "__main__":
    typer.run(main)
