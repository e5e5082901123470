"""A process joins the others, and leaves them before it ends."""

import subprocess
import sys

from runs import ENVIRONMENT

SCRIPT = """
import atexit, torch.distributed as dist
atexit.register(lambda: print(dist.is_initialized()))  # the first to be registered runs last
from kvfuse.support.processes import processes
if {joins}:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print(processes().num_processes, dist.is_initialized())
"""


def lines_of(joins: bool) -> list[str]:
    env = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(joins=joins)], env=env, check=True, capture_output=True, text=True
    )
    return ran.stdout.splitlines()


def test_the_group_is_left_before_the_process_ends():
    assert lines_of(joins=True) == ["1 True", "False"]


def test_alone_there_is_nothing_to_leave():
    assert lines_of(joins=False) == ["1 False", "False"]
