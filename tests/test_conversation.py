"""A conversation goes on where the models' context ends, and after a question that cannot be read."""

import pytest

from kvfuse.conversation import Conversation, sampling
from kvfuse.demo import load_pair
from kvfuse.errors import PromptError
from kvfuse.model import CacheToCache
from kvfuse.testing import tiny_fuser, tiny_model, tiny_tokenizer

QUESTION = "What is the capital of Norway?"


@pytest.fixture
def conversation():
    return Conversation(load_pair(), max_new_tokens=4, do_sample=False)


def ask(conversation, question=QUESTION):
    return "".join(conversation.ask(question))


def test_the_first_answer_is_that_of_the_pair(conversation):
    assert ask(conversation) == load_pair().chat(QUESTION, max_new_tokens=4, do_sample=False) == "Oslo"


def test_later_questions_are_read_after_earlier_ones(conversation, monkeypatch):
    read = []
    stream = CacheToCache.stream
    monkeypatch.setattr(CacheToCache, "stream", lambda pair, chat, **kw: read.append(chat) or stream(pair, chat, **kw))
    answer = ask(conversation)
    ask(conversation, "Where?")
    roles = ["user", "assistant", "user"]
    contents = [QUESTION, answer, "Where?"]
    assert read[1] == [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_the_oldest_questions_go_where_the_context_ends(family):
    """Also with learnt positions, of which there are no more than the context: the answer needs room, too."""
    receiver, sharer = tiny_model(family), tiny_model("llama", tiny_tokenizer(300, "lines"), seed=1)
    receiver.context = sharer.context = 64
    pair = CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer)])
    conversation = Conversation(pair, "Answer in one word.", max_new_tokens=8)
    for _ in range(5):
        ask(conversation, "What?")
    assert 0 < conversation.dropped < 5
    assert len(pair.align([*conversation._system, *conversation._turns[:-1]]).receiver.ids) + 8 <= 64


@pytest.mark.parametrize("question", ["word " * 400, "caf\udce9"])
def test_a_question_that_cannot_be_read_changes_nothing(conversation, question):
    ask(conversation)
    before = list(conversation._turns)
    with pytest.raises(PromptError):
        ask(conversation, question)
    assert conversation._turns == before
    assert conversation.dropped == 0
    assert ask(conversation)


def test_options_that_cannot_be_are_refused_before_a_question():
    with pytest.raises(PromptError, match="max_new_tokens"):
        Conversation(load_pair(), max_new_tokens=0)


def test_sampling():
    assert sampling() == {}
    assert sampling(0.0) == {"do_sample": False}
    assert sampling(0.7) == {"do_sample": True, "temperature": 0.7}
    for wrong in ({"temperature": -1.0}, {"temperature": float("nan")}, {"seed": -1}, {"seed": 2**64}):
        with pytest.raises(PromptError, match="expected a"):
            sampling(**wrong)
