"""Where the time of an answer goes: phases follow one another, and nobody waits who did not ask."""

import pytest
import torch
from transformers import StopStringCriteria

from kvfuse.methods import Fused, Single, TextToText
from kvfuse.model import CacheToCache
from kvfuse.stages import phases
from kvfuse.stages.phases import PHASES, measured, phase
from kvfuse.testing import tiny_fuser

PROMPT = [{"role": "user", "content": "What is the capital of Norway?"}]
OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def fused(pair, **options):
    return Fused(CacheToCache(pair.receiver, pair.sharers, [tiny_fuser(pair.receiver, pair.sharers[0], **options)]))


def test_each_method_has_its_own_phases(pair):
    receiver, sharer = Single("receiver", pair.receiver), Single("sharer", pair.sharers[0])
    alone, all_but_hint = ["receiver_prefill", "decode"], list(PHASES[1:])
    expected = [
        (receiver, alone),
        (sharer, ["sharer_prefill", "decode"]),
        (Fused(pair), all_but_hint),
        (fused(pair, fuse_response=True), all_but_hint),
        (TextToText(receiver, sharer, request="Hint: {question}", hint_tokens=4), ["hint", *alone]),
        (TextToText(Fused(pair), sharer, request="Hint: {question}", hint_tokens=4), ["hint", *all_but_hint]),
    ]
    for method, names in expected:
        answer = method.timed(PROMPT, **OPTIONS)
        assert list(answer.phases) == names
        assert all(seconds > 0 for seconds in answer.phases.values())
        assert sum(answer.phases.values()) <= answer.seconds
        assert answer.text == method.generate([PROMPT], **OPTIONS)[0].text


def test_nothing_is_measured_and_nothing_waits_unless_asked(pair, monkeypatch):
    monkeypatch.setattr(phases, "synchronize", lambda: pytest.fail("waited"))
    assert Fused(pair).generate([PROMPT], **OPTIONS)[0].phases == {}
    monkeypatch.undo()
    seen = []
    monkeypatch.setattr(phases, "synchronize", lambda: seen.append(1))
    Fused(pair).timed(PROMPT, **OPTIONS)
    assert len(seen) == 9  # three phases begin and end, and the last two share one moment


def test_beams_and_stopping_criteria_are_left_as_they_are(pair):
    options = {
        **OPTIONS,
        "num_beams": 2,
        "stopping_criteria": [StopStringCriteria(pair.receiver.tokenizer, ["no such text"])],
    }
    answer = Fused(pair).timed(PROMPT, **options)
    assert answer.text == Fused(pair).generate([PROMPT], **options)[0].text
    assert "first_token" in answer.phases
    assert len(options["stopping_criteria"]) == 1


def test_a_phase_within_another_is_part_of_it_and_a_failure_ends_it():
    with measured() as stopwatch:
        with phase("hint"), phase("decode"):
            pass
        assert list(stopwatch.seconds) == ["hint"]
        with pytest.raises(ValueError, match="stop"), phase("fuse"):
            raise ValueError("stop")
        assert stopwatch.phase is None
    assert list(stopwatch.seconds) == ["hint", "fuse"]
    with phase("decode"):
        pass
    assert list(stopwatch.seconds) == ["hint", "fuse"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_are_waited_for():
    x = torch.ones(8, device="cuda")
    phases.synchronize()
    assert x.sum() == 8
