import math

import numpy as np
import pytest

from kvfuse.analysis.answering import ask, longest_answer
from kvfuse.analysis.study import Study
from kvfuse.methods import Fused, Method
from kvfuse.methods.base import OptionScore, Reply


class Parrot(Method):
    """Knows some answers, and finds each of their characters as likely as two others."""

    name = "parrot"

    def __init__(self, said):
        self.said = said

    def reply(self, prompts, **options):
        return [Reply(self.said.get(prompt[0]["content"], "?"), 1, 1) for prompt in prompts]

    def score(self, prompts, options):
        return [[OptionScore(-len(text) * math.log(2), False, 1) for text in some] for some in options]


@pytest.fixture(scope="module")
def study():
    return Study.tiny()


def test_case_and_white_space_do_not_count(study):
    texts = [one.prompt[0]["content"] for one in study.questions]
    answered = ask(study, Parrot({texts[0]: " oslo ", texts[1]: "dutch", texts[3]: "answers"}))
    assert answered.right.tolist() == [True, True, False, False]
    assert answered.replies[2] == "?"
    np.testing.assert_allclose(answered.bits, 1)
    assert answered.to_dict()["accuracy"] == 0.5
    low, high = answered.to_dict()["interval"]
    assert low < 0.5 < high


def test_every_question_has_its_own_answer_whatever_the_batch(study):
    method = Fused(study.pair)
    answered, options = ask(study, method), {"max_new_tokens": longest_answer(study), "do_sample": False}
    for place, one in enumerate(study.questions):
        assert answered.replies[place] == method.reply([one.prompt], **options)[0].text
        ((score,),) = method.score([one.prompt], [[one.answer]])
        assert answered.bits[place] == pytest.approx(-score.log_likelihood / math.log(2) / len(one.answer), rel=1e-4)
