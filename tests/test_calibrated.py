"""Contextual calibration removes a letter prior and nothing else."""

from dataclasses import replace

import pytest

from kvfuse.methods import Calibrated, Single
from kvfuse.methods.calibrated import letters, void_options

LETTERED = "Which?\nI. one\nA. Oslo\nB) Bern\n(C) Rome\nD: Paris\nAnswer:"
VOID = "Which?\nI. one\nA. N/A\nB) N/A\n(C) N/A\nD: N/A\nAnswer:"
QUESTIONS = [
    f"Which?\n\nA. {first}\nB. {second}\nC. hi"
    for first, second in (("Oslo", "model"), ("two", "question"), ("speak", "English"))
]


@pytest.fixture
def single(receiver):
    return Single("receiver", receiver)


def chat(text):
    return [{"role": "system", "content": "A. say\nB. so"}, {"role": "user", "content": text}]


def test_letters_are_those_before_options_from_a_on():
    assert letters(LETTERED) == letters(chat(LETTERED)) == ["A", "B", "C", "D"]
    assert letters("A. first\nC. third") == ["A"]
    assert letters("A man. Who?\nB. he") == []
    assert letters([{"role": "user", "content": [{"type": "text", "text": LETTERED}]}]) == []


def test_only_what_stands_behind_a_letter_is_taken_away():
    assert void_options(LETTERED) == VOID
    assert void_options(chat(LETTERED)) == chat(VOID)
    assert void_options(VOID) == VOID
    for plain in ("What is Oslo?", "A. only one", chat("hi")):
        assert void_options(plain) is plain


def test_scores_are_log_probabilities_minus_those_after_the_content_free_prompt(single):
    prompts, options = [chat(LETTERED), chat("hi"), LETTERED], [["A", "B"], ["Oslo"], [" A", " B", " C"]]
    own, void = single.score(prompts, options), single.score([chat(VOID), chat("hi"), VOID], options)
    calibrated = Calibrated(single).score(prompts, options)
    for rows in zip(calibrated, own, void, prompts, strict=True):
        for score, raw, prior in zip(*rows[:3], strict=True):
            expected = raw.log_likelihood - (prior.log_likelihood if rows[3] != chat("hi") else 0.0)
            assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
            assert (score.greedy, score.tokens) == (raw.greedy, raw.tokens)


def test_a_content_free_prompt_of_ones_own(single):
    calibrated = Calibrated(single, content_free=lambda prompt: "N/A")
    ((score,),) = calibrated.score(["hi"], [[" A"]])
    difference = (
        single.score(["hi"], [[" A"]])[0][0].log_likelihood - single.score(["N/A"], [[" A"]])[0][0].log_likelihood
    )
    assert score.log_likelihood == pytest.approx(difference, abs=1e-4)


def test_a_letter_that_is_liked_everywhere_is_not_chosen_everywhere(single):
    """A prior that is added to one letter after every prompt changes no calibrated answer."""

    class Biased(Single):
        def score(self, prompts, options):
            liked = super().score(prompts, options)
            prior = [[100.0 * ("A" in text) for text in texts] for texts in options]
            return [list(map(add, scores, more)) for scores, more in zip(liked, prior, strict=True)]

    def add(score, more):
        return replace(score, log_likelihood=score.log_likelihood + more)

    biased = Biased("receiver", single.model)
    own = [
        max(scores, key=lambda score: score.log_likelihood) is scores[0]
        for scores in biased.score(QUESTIONS, [["A", "B", "C"]] * 3)
    ]
    assert own == [True] * 3
    replies, fair = (
        [reply.text for reply in Calibrated(reader, answer="It is {letter}").reply(QUESTIONS)]
        for reader in (biased, single)
    )
    assert replies == fair
    assert set(replies) != {"It is A"}
    assert all(reply.startswith("It is ") and reply[-1] in "ABC" for reply in replies)


def test_without_options_the_receiver_answers(single):
    options = {"max_new_tokens": 5, "do_sample": False}
    lettered, plain = Calibrated(single).reply([chat(LETTERED), chat("hi")], **options)
    assert plain == single.reply([chat("hi")], **options)[0]
    assert lettered.text in [f"The correct answer is {letter}" for letter in "ABCD"]
    assert lettered.tokens == 0
    both = single.reply([chat(LETTERED), chat(VOID)], **options)
    assert lettered.tokens_in == sum(reply.tokens_in for reply in both)
