"""A folder belongs to one run at a time, must be writable, and keeps the inputs that its run was begun with."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from runs import ENVIRONMENT

from kvfuse.errors import CheckpointError, RecipeError
from kvfuse.support.run_folder import changed_inputs, changed_settings, claim, refuse_changes

HOLD = """
import sys
from pathlib import Path
from kvfuse.errors import RecipeError
from kvfuse.support.run_folder import claim
with claim(Path(sys.argv[1]), RecipeError):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RecipeError, match="got a second one while the first"), claim(folder, RecipeError):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with claim(folder, RecipeError):
            (folder / "written").touch()
    assert os.listdir(folder) == ["written"]


def test_a_folder_that_stays_empty_is_removed_again(tmp_path):
    with pytest.raises(KeyError), claim(tmp_path / "a" / "b", RecipeError):
        raise KeyError
    (tmp_path / "there").mkdir()
    with claim(tmp_path / "there", RecipeError):
        pass
    assert os.listdir(tmp_path) == ["there"]


@pytest.mark.parametrize(
    ("folder", "message"),
    [("file", "got the file"), ("file/x", "Not a directory"), ("/proc/x", "can be written"), ("a" * 300, "too long")],
)
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, folder, message):
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=message) as caught, claim(tmp_path / folder, RecipeError):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_disk_that_takes_nothing_is_found_before_the_run(tmp_path, monkeypatch, code):
    def refuse(folder):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("kvfuse.support.run_folder._write_probe", refuse)
    with pytest.raises(RecipeError, match=os.strerror(code)), claim(tmp_path / "out", RecipeError):
        raise AssertionError("the run was begun")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("PytorchStreamWriter failed writing file data/3"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 552320 vs 552212"),
        RuntimeError("database or disk is full"),
    ],
)
def test_a_disk_that_becomes_full_is_one_line(tmp_path, fault):
    with pytest.raises(RecipeError, match="got a full disk; make room"), claim(tmp_path, RecipeError):
        raise fault


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "broken"), CheckpointError("expected"), ValueError("other")])
def test_other_errors_are_left_alone(tmp_path, fault):
    with pytest.raises(type(fault), match=str(fault).split()[-1]), claim(tmp_path, RecipeError):
        raise fault


def test_settings_are_compared_key_by_key():
    before = {"train": {"steps": 2, "seed": 1}, "output": "a", "data": {"path": "b", "limit": None}}
    now = {"train": {"steps": 3, "seed": 1}, "output": "c", "data": {"path": "d", "limit": None}, "note": "long " * 30}
    changes = changed_settings(before, now, ignored=("output", "data"))
    assert changes[0] == "train.steps 2 -> 3"
    assert changes[1].startswith("note None -> long")
    assert len(changes[1]) < 80
    with pytest.raises(RecipeError, match=r"changed since: train.steps 2 -> 3, note .*--overwrite"):
        refuse_changes("out", changes, RecipeError)


def test_inputs_that_were_not_recorded_are_not_compared():
    assert changed_inputs(None, {"the data": "1"}) == []
    assert changed_inputs({"the data": "1"}, {"the data": "1", "the fuser": "2"}) == []
    assert changed_inputs({"the data": "1", "the fuser": "2"}, {"the data": "0"}) == ["the data", "the fuser"]
