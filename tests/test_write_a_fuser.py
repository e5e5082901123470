"""The fuser of ``docs/write_a_fuser.md`` works from an installed package and registered by hand."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "write_a_fuser.md").read_text(encoding="utf-8")
(TOML,), (RECIPE,), (COMMANDS,), (FUSER, BY_HAND) = (
    re.findall(rf"```{name}\n(.*?)```", DOC, re.DOTALL) for name in ("toml", "yaml", "bash", "python")
)


@pytest.fixture
def run(tmp_path):
    """Run Python in a folder with the document's files, its package installed."""
    (tmp_path / "linear_fuser.py").write_text(FUSER)
    (tmp_path / "linear.yaml").write_text(RECIPE)
    (tmp_path / "kvfuse").symlink_to(ROOT / "kvfuse")
    installed = tmp_path / "linear_fuser-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: linear-fuser\nVersion: 1.0\n")
    ((group, points),) = tomllib.loads(TOML)["project"]["entry-points"].items()
    (installed / "entry_points.txt").write_text(
        "\n".join([f"[{group}]", *(f"{kind} = {cls}" for kind, cls in points.items())])
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        ran = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    return run


@pytest.mark.slow
def test_its_commands_train_and_use_it(run):
    train, chat = (shlex.split(line)[1:] for line in COMMANDS.splitlines())
    printed = run("-m", "kvfuse.cli", *train, "train.steps=2", "data.limit=40", "train.batch_size=4")
    assert "Open gates: keys 3 of 3, values 3 of 3." in printed
    assert run("-m", "kvfuse.cli", *chat).strip()


@pytest.mark.slow
def test_it_works_by_hand(run):
    expected = re.findall(r"print\(.*\)\s+# (.*)", BY_HAND)
    assert run("-c", BY_HAND).splitlines() == expected


def test_it_is_short():
    assert len([line for line in FUSER.splitlines() if line.strip()]) < 40
    assert len(DOC.splitlines()) < 110
