import pytest
from helpers import chat_of

from kvfuse.training.data.examples import Example, examples_of, turns, without_oldest_turn
from kvfuse.training.recipe import DataSection

LONG = chat_of(
    ("system", "s"),
    ("user", "q1"),
    ("assistant", "a1"),
    ("user", "q2"),
    ("assistant", "call"),
    ("tool", "t"),
    ("assistant", "a2"),
)


def test_the_last_turn_is_learnt_by_default():
    assert turns(LONG) == [Example(LONG[:-1], "a2")]


def test_every_turn_is_learnt_where_asked():
    assert turns(LONG, "all") == [Example(LONG[:2], "a1"), Example(LONG[:4], "call"), Example(LONG[:-1], "a2")]


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        ([], "wrong roles: no messages"),
        (LONG[:2], "wrong roles: the last message is the user's"),
        (chat_of(("system", "s"), ("assistant", "a")), "wrong roles: the assistant speaks before the user"),
        (chat_of(("user", "q"), ("assistant", " \n")), "empty response"),
    ],
)
def test_a_chat_without_a_turn_to_learn_is_refused(messages, kind):
    with pytest.raises(ValueError, match=kind):
        turns(messages)


def test_an_empty_turn_matters_only_where_it_is_learnt():
    silent = [message if message["content"] != "a1" else {**message, "content": ""} for message in LONG]
    assert turns(silent)[0].response == "a2"
    with pytest.raises(ValueError, match="empty response"):
        turns(silent, "all")


def test_history_goes_question_by_question_and_the_system_stays():
    shorter = without_oldest_turn(Example(LONG[:-1], "a2"))
    assert shorter == Example([LONG[0], *LONG[3:-1]], "a2")
    assert without_oldest_turn(shorter) is None
    assert without_oldest_turn(Example("a text", "more")) is None


def test_documents_are_cut_at_white_space():
    data = DataSection(path="text.txt", prompt_characters=5, response_characters=7)
    first, *_ = examples_of({"text": "one two three four five\n"}, data)
    (second,) = examples_of({"text": "\nsix seven eight"}, data)
    assert (first.prompt, first.response, first.ends) == ("one two", " three four", False)
    assert (second.prompt, second.response, second.ends) == ("six seven", " eight", True)
    assert examples_of({"text": "short"}, data) == []


def test_a_long_document_gives_several_examples():
    document = " ".join(f"word{i}" for i in range(100))
    examples = examples_of(
        {"text": document}, DataSection(path="text.txt", prompt_characters=20, response_characters=10)
    )
    joined = " ".join(example.prompt + example.response for example in examples)
    assert document.startswith(joined)
    assert len(document) - len(joined) < 40, "only a last piece without a response is left out"
    assert not any(example.ends for example in examples[:-1])


def test_a_column_of_documents_can_be_asked_for_among_others():
    data = DataSection(path="d", format="text", prompt_characters=3, response_characters=3)
    assert examples_of({"text": "one two", "id": 1}, data) == [Example("one", " two")]
    with pytest.raises(ValueError, match="no column 'text'"):
        examples_of({"story": "one two"}, data)
