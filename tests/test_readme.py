"""The README's commands and code run, and its tree names every file."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from answers import answers

from kvfuse.cli import app
from kvfuse.evaluation.predictions import append

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for language, text in FENCES
    if language == "bash"
    for line in text.splitlines()
    if line and not line.startswith("#")
]
PYTHON = [text for language, text in FENCES if language == "python"]
ENV = {**os.environ, "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("kvfuse ")])
def test_commands_run(command, tmp_path, monkeypatch):
    """In this process, which has imported everything, and in a folder with links to what a command reads."""
    for folder in ("recipes", "kvfuse"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    words = shlex.split(command, comments=True)[1:]
    if words[0] == "train":
        words += ["train.steps=2", "data.limit=40"]
    if words[0] == "eval":
        words += ["evaluation.limit=6", "evaluation.timed=1", "evaluation.methods=[receiver,cache-to-cache]"]
        words += ["evaluation.tasks=[openbookqa_generate]"] if "--smoke" in words else []
    if words[0] == "analyze":
        words += ["--smoke"]
    if words[0] == "report":
        append(tmp_path / words[1] / "predictions.jsonl", answers("receiver", [1, 0]))
    if words[0] == "demo":
        if "build" in words:
            pytest.skip("takes a quarter of an hour")
        words += [] if "--ask" in words else ["--limit", "8"]
    monkeypatch.chdir(tmp_path)
    assert not app(words, standalone_mode=False), "the exit status, where a command exits by itself"


def test_the_command_is_installed():
    ran = subprocess.run(
        [sys.executable, "-m", "kvfuse.cli", "list", "pairs"], env=ENV, check=True, capture_output=True, text=True
    )
    assert "qwen3_0.6b" in ran.stdout


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_make_targets_exist(command):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    subprocess.run(
        ["make", "--dry-run", *shlex.split(command, comments=True)[1:]], cwd=ROOT, check=True, capture_output=True
    )


def test_every_command_is_one_of_the_two():
    assert COMMANDS
    assert all(line.startswith(("make ", "kvfuse ", "git ", "cd ", "pip ")) for line in COMMANDS)


@pytest.mark.parametrize("code", PYTHON)
def test_code_prints_what_its_comments_say(code):
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENV, check=True, capture_output=True, text=True)
    expected = [comment.strip() for comment in re.findall(r"print\(.*\)\s+# (.*)", code)]
    assert expected
    assert ran.stdout.splitlines() == expected


def paths(tree):
    """The whole path of every line of a tree, whose folders end with a slash and whose depth is its indentation."""
    parents = []
    for line in tree.splitlines():
        indentation, name = re.match(r"( *)(\S+)", line).groups()
        parents[len(indentation) // 2 :] = [name.rstrip("/")]
        yield "/".join(parents) + "/" * name.endswith("/")


def test_the_tree_names_every_file_and_no_other():
    """Folders of code too; of other files and folders only that they are there."""
    (tree,) = (text for language, text in FENCES if language == "text")
    named = list(paths(tree))
    code = [path.relative_to(ROOT) for path in (ROOT / "kvfuse").rglob("*.py")]
    files = {path.as_posix() for path in code if path.name != "__init__.py"}
    folders = {f"{path.parent.as_posix()}/" for path in code}
    assert sorted({*files, *folders}.difference(named)) == []
    assert [
        path for path in named if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())
    ] == []
    assert len(named) == len(set(named))


def test_a_path_of_the_tree_follows_its_indentation():
    tree = "a/\n  b/   a folder\n    c.py   a file\n  d.py\ne/\n"
    assert list(paths(tree)) == ["a/", "a/b/", "a/b/c.py", "a/d.py", "e/"]


def test_the_table_is_the_measured_one():
    from kvfuse.demo.pair_folder import PairFolder
    from kvfuse.demo.show import markdown

    assert markdown(PairFolder().provenance["figures"]) in README
