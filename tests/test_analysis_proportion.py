import numpy as np
import pytest

from kvfuse.analysis.proportion import PartlyFused, first, last, messages, run, template
from kvfuse.analysis.study import Study
from kvfuse.errors import AnalysisError
from kvfuse.methods import Fused, Single

OPTIONS = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def study():
    return Study.tiny()


def said(study, method):
    prompts = [one.prompt for one in study.questions]
    scores = method.score(prompts, [["Oslo"]] * len(prompts))
    return [one.text for one in method.reply(prompts, **OPTIONS)], [one.log_likelihood for (one,) in scores]


@pytest.mark.parametrize("cut", [first, last])
def test_nothing_is_the_receiver_and_everything_is_cache_to_cache(study, cut):
    receiver, fused = said(study, Single("receiver", study.pair.receiver)), said(study, Fused(study.pair))
    assert receiver[1] != fused[1]
    for share, expected in ((0.0, receiver), (1.0, fused)):
        texts, scores = said(study, PartlyFused(study.pair, cut(share)))
        assert texts == expected[0]
        assert scores == pytest.approx(expected[1], abs=1e-4)


def test_parts_are_of_what_is_fusable(study):
    for one in study.questions:
        aligned = study.pair.align(one.prompt)
        places = np.flatnonzero(aligned.fusable)
        half = round(len(places) / 2)
        assert np.flatnonzero(aligned.fusable & first(0.5)(aligned)).tolist() == places[:half].tolist()
        assert np.flatnonzero(aligned.fusable & last(0.5)(aligned)).tolist() == places[len(places) - half :].tolist()


def test_messages_and_template_are_all_of_the_prompt_in_two(study):
    for one in study.questions:
        aligned = study.pair.align(one.prompt)
        inside, outside = messages(aligned), template(aligned)
        assert (inside ^ outside).all()
        text = study.pair.receiver.tokenizer.decode(aligned.receiver.ids[inside])
        assert text.strip() == one.prompt[0]["content"]


def test_ends_of_the_axis_are_measured_once(study):
    figures = run(study, shares=[0.5]).figures
    assert figures["shares"] == [0, 0.5, 1]
    assert figures["ends"]["first"][0] is figures["ends"]["last"][0]
    assert sum(figures["fused_positions"].values()) == pytest.approx(1)


@pytest.mark.parametrize("share", [0, 1.0, -0.5, 25])
def test_other_shares_are_refused(study, share):
    with pytest.raises(AnalysisError, match="between 0 and 1"):
        run(study, shares=[0.5, share])
