"""kvfuse doctor tells what is well, and what is not."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from kvfuse.analysis.doctor import Check, examine, line, sample_of, verdict
from kvfuse.analysis.study import Study
from kvfuse.checkpoint import save_fuser
from kvfuse.cli import app
from kvfuse.demo.pair_folder import PairFolder
from kvfuse.errors import AnalysisError
from kvfuse.model import CacheToCache
from kvfuse.testing import tiny_fuser


def wrong(study):
    return [check.name for check in examine(study) if not check.well]


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_next"])
def test_a_pair_that_is_well(family):
    checks = list(examine(Study.tiny(family)))
    assert [check.name for check in checks if not check.well] == []
    assert verdict(checks) == f"all {len(checks)} checks passed"


def test_each_check_is_given_as_soon_as_it_is_made():
    """A line says what comes next before it is measured, and no later part runs before the earlier ones are given."""
    said = []
    checks = examine(Study.tiny(), said.append)
    assert next(checks).name == "receiver"
    assert said == ["checking models"]
    list(checks)
    assert said[-1] == "checking memory and time"


def test_a_line_is_wrapped_below_what_was_seen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = line(Check("gates closed = receiver alone", "word " * 30, well=False)).splitlines()
    assert lines[0].startswith("WRONG  gates closed = receiver alone")
    assert {len(text) - len(text.lstrip()) for text in lines[1:]} == {lines[0].index("word")}
    assert max(map(len, lines)) <= 80


def test_a_pair_that_fuses_the_response_is_well():
    study = Study.tiny()
    fuser = tiny_fuser(study.pair.receiver, study.pair.sharers[0], fuse_response=True)
    assert wrong(replace(study, pair=CacheToCache(study.pair.receiver, study.pair.sharers, [fuser]))) == []


def test_closed_gates_are_told():
    study = Study.tiny()
    study.pair.fusers[0].gate.logit.data.fill_(-1)
    assert wrong(study) == ["gates"]


def test_weights_that_are_no_numbers_are_told():
    study = Study.tiny()
    next(study.pair.fusers[0].parameters()).data.fill_(torch.nan)
    assert {"fuser", "gates closed = receiver alone", "fused answers"} <= set(wrong(study))


def test_a_receiver_that_changes_under_closed_gates_is_told(monkeypatch):
    study = Study.tiny()
    read = CacheToCache.read_receiver

    def disturbed(self, prompt):
        cache = read(self, prompt)
        cache.layers[0].values = cache.layers[0].values + 1
        return cache

    monkeypatch.setattr(CacheToCache, "read_receiver", disturbed)
    assert "gates closed = receiver alone" in wrong(study)


def test_a_prompt_that_cannot_be_read_is_a_check_that_failed():
    study = Study.tiny()
    long = replace(study.questions[0], prompt=[{"role": "user", "content": "Oslo " * 400}])
    assert wrong(replace(study, questions=[long])) == ["answers", "costs"]


def test_models_need_a_fuser():
    with pytest.raises(AnalysisError, match="--fuser"):
        sample_of(receiver="somewhere")


def test_the_exit_status_of_the_command_reports_failures(tmp_path):
    pair = PairFolder().fused(0)
    runner = CliRunner()
    assert runner.invoke(app, ["doctor"]).exit_code == 0
    pair.fusers[0].gate.logit.data.fill_(-1)
    save_fuser(pair.fusers[0], tmp_path / "shut")
    ran = runner.invoke(app, ["doctor", "-f", str(tmp_path / "shut")])
    assert ran.exit_code == 1
    assert ran.output.strip().endswith("wrong: gates")
