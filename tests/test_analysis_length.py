"""Gain by length: what shifts and what does not."""

from dataclasses import replace

import pytest
import torch

from kvfuse.analysis.length import ALONE, FILLER, _fill, ask, fit_ridge, run
from kvfuse.analysis.readout import read, shift_positions
from kvfuse.analysis.study import Study
from kvfuse.checkpoint import save_fuser
from kvfuse.errors import AnalysisError
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import stack
from kvfuse.prompts.tokenized import tokenize
from kvfuse.testing import tiny_fuser


def with_rope(study, rope):
    pair = study.pair
    return CacheToCache(pair.receiver, pair.sharers, [tiny_fuser(pair.receiver, pair.sharers[0], rope=rope)])


def test_a_rotary_receiver_alone_is_indifferent_to_a_shift():
    study = Study.tiny()
    near, far = (ask(study, {"own": study.pair}, shift)[ALONE] for shift in (0, 40))
    assert near == pytest.approx(far, abs=1e-3)


@pytest.mark.parametrize(("rope", "same"), [("removed", True), ("kept", False)])
def test_only_a_fuser_that_sees_turned_keys_notices_a_shift(rope, same):
    study = Study.tiny()
    near, far = (ask(study, {"rope": with_rope(study, rope)}, shift)["rope"] for shift in (0, 40))
    assert (near == pytest.approx(far, abs=1e-2)) == same


def test_a_shift_is_one_of_all_models():
    study = Study.tiny()
    prompt = stack([study.pair.align(study.questions[0].prompt)])
    moved = shift_positions(prompt, 5)
    assert torch.equal(moved.positions, prompt.positions + 5)
    assert torch.equal(moved.sharers[0].positions, prompt.sharers[0].positions + 5)
    values = [read(study.pair, study.questions[:1], shift).clean.value for shift in (0, 5)]
    torch.testing.assert_close(*values, atol=1e-4, rtol=1e-4)


def test_filler_is_as_long_as_asked_for():
    study = Study.tiny()
    before, after = (
        len(tokenize(asked.questions[0].prompt, study.pair.receiver.tokenizer).ids)
        for asked in (study, _fill(study, FILLER, 60))
    )
    assert 56 <= after - before <= 62
    assert _fill(study, FILLER, 0).questions == study.questions


def test_a_fuser_in_closed_form_is_fitted():
    study = Study.tiny()
    first = fit_ridge(study, "removed").fusers[0]
    assert first.config.rope == "removed"
    assert first.projection.weight.abs().sum() > 0


def test_runs_with_a_fuser_trained_so(tmp_path):
    study = Study.tiny()
    save_fuser(with_rope(study, "removed").fusers[0], tmp_path / "removed")
    figures = run(study, removed=str(tmp_path / "removed")).figures
    assert list(figures["prompts"]["shifted"]) == ["alone", "kept (trained)", "removed (trained)"]
    assert sum(group["ways"]["alone"]["questions"] for group in figures["responses"]) == 4
    save_fuser(study.pair.fusers[0], tmp_path / "kept")
    with pytest.raises(AnalysisError, match="rope=removed"):
        run(study, removed=str(tmp_path / "kept"))


def test_answers_are_needed():
    study = Study.tiny()
    with pytest.raises(AnalysisError, match="answers"):
        run(replace(study, questions=[replace(study.questions[0], answer=None)]))
