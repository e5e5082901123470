import json
from collections import Counter
from typing import get_args

import pytest
from helpers import chat_of

from kvfuse.training.data.shapes import ROLES, SHAPES, to_messages
from kvfuse.training.recipe import DataSection

ASKED = chat_of(("user", "q"), ("assistant", "a"))
WITH_SYSTEM = [*chat_of(("system", "s")), *ASKED]
METALS = ["wood", "iron", "air"]
KNOWN = [
    ("messages", {"messages": WITH_SYSTEM}, WITH_SYSTEM),
    ("messages", {"messages": [{**message, "name": None} for message in ASKED], "id": 3}, ASKED),
    (
        "messages",
        {
            "messages": chat_of(
                ("user", [{"type": "text", "text": "q"}]), ("assistant", [{"type": "text", "value": "a"}])
            )
        },
        ASKED,
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system_prompt": None},
        ASKED,
    ),
    (
        "sharegpt",
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "system": "s"},
        WITH_SYSTEM,
    ),
    (
        "sharegpt",
        {"conversations": [{"from": role, "value": role[0]} for role in ("system",)], "system": "other"},
        chat_of(("system", "s")),
    ),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, ASKED),
    ("alpaca", {"instruction": "q", "output": "a", "input": None, "system": "s", "history": []}, WITH_SYSTEM),
    (
        "alpaca",
        {"instruction": "Add", "input": "1, 2", "output": "3", "history": [["q", "a"]]},
        [*ASKED, *chat_of(("user", "Add\n\n1, 2"), ("assistant", "3"))],
    ),
    ("pairs", {"prompt": "q", "response": "a"}, ASKED),
    ("pairs", {"prompt": "q"}, ASKED[:1]),
    ("longbench", {"input": "", "context": "q", "answers": ["a", "other"], "all_classes": None}, ASKED),
]


@pytest.mark.parametrize(("shape", "row", "expected"), KNOWN)
def test_a_shape_is_recognised_and_read(shape, row, expected):
    assert to_messages(row) == to_messages(row, shape) == expected


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("mmlu", {"question": "Which is a metal?", "choices": METALS, "answer": 1, "subject": "chemistry"}),
        (
            "openbookqa",
            {"question_stem": "Which is a metal?", "choices": {"text": METALS, "label": [*"ABC"]}, "answerKey": "B"},
        ),
        (
            "openbookqa",
            {"question": "Which is a metal?", "choices": {"text": METALS, "label": [*"123"]}, "answerKey": "2"},
        ),
    ],
)
def test_multiple_choice_is_asked_alike_in_all_sets(shape, row):
    question, answer = to_messages(row)
    assert to_messages(row, shape) == [question, answer]
    assert question["content"].startswith("Question: Which is a metal?\n\nChoices:\nA. wood\nB. iron\nC. air\n\n")
    assert answer["content"] == "The correct answer is B."


def test_code_is_asked_for_with_its_first_test():
    row = {"text": "Add one.", "code": "def f(x):\r\n\treturn x + 1\r\n", "test_list": ["assert f(1) == 2", "…"]}
    system, request, answer = to_messages(row)
    assert to_messages(row, "mbpp") == [system, request, answer]
    assert request["content"] == "Add one.\nReply with the code alone. It must pass:\nassert f(1) == 2"
    assert answer["content"] == "def f(x):\n    return x + 1"


def test_a_long_text_comes_before_its_question():
    question, answer = to_messages({"input": "Who?", "context": "A long text.", "answers": ["Ann", "Bo"]})
    assert question["content"].index("A long text.") < question["content"].index("Who?")
    assert answer["content"] == "Ann"


def test_what_a_message_holds_besides_text_is_kept():
    calling = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert to_messages({"messages": [calling]}) == [{**calling, "content": ""}]


def test_tool_calls_keep_their_text():
    spoken = [("human", "q"), ("function_call", '{"name": "f"}'), ("observation", "{}"), ("gpt", "a")]
    read = to_messages({"conversations": [{"from": role, "value": text} for role, text in spoken]})
    assert [message["role"] for message in read] == ["user", "assistant", "tool", "assistant"]
    assert [message["content"] for message in read] == [text for _, text in spoken]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"something": 1}, "unknown shape: columns something"),
        ({"messages": None}, "wrong shape"),
        ({"messages": ["q", "a"]}, "wrong shape"),
        ({"messages": chat_of(("user", 3))}, "wrong shape: expected text, got 3"),
        ({"messages": chat_of(("user", [{"type": "image", "url": "x"}]))}, "wrong shape: expected text"),
        ({"messages": chat_of(("narrator", "q"))}, "wrong roles: unknown 'narrator'"),
        ({"conversations": [{"from": "human"}, {"value": "a"}]}, "wrong shape"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "wrong shape: answer 2 to 2 choices"),
        ({"question": "q", "choices": ["a", "b"], "answer": "A"}, "wrong shape"),
        (
            {"question_stem": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"},
            "wrong shape: answerKey 'B'",
        ),
        ({"input": "q", "context": "c", "answers": []}, "wrong shape"),
    ],
)
def test_a_wrong_row_says_what_is_wrong(row, kind):
    with pytest.raises(ValueError, match=kind):
        to_messages(row)


def test_a_forced_shape_wants_its_own_columns():
    with pytest.raises(ValueError, match="not a row of the shape alpaca"):
        to_messages({"prompt": "q", "response": "a"}, "alpaca")


def test_every_shape_can_be_named_in_a_recipe():
    assert {"auto", "text", *SHAPES} == set(get_args(DataSection.model_fields["format"].annotation))


def rows_of(file):
    text = file.read_text(encoding="utf-8")
    return json.loads(text) if text.startswith("[") else list(map(json.loads, text.splitlines()))


@pytest.mark.parametrize(
    ("file", "count", "turns"),
    [
        ("chat/alpaca_en_demo.json", 999, {"user": 999, "assistant": 999}),
        ("chat/alpaca_zh_demo.json", 1000, {"user": 1000, "assistant": 1000}),
        ("chat/glaive_toolcall_en_demo.json", 300, {"user": 746, "assistant": 746 + 211, "tool": 211}),
        ("chat/v1_sft_demo.jsonl", 500, None),
        ("openbookqa/train.jsonl", 4957, {"user": 4957, "assistant": 4957}),
    ],
)
def test_real_files_are_read_whole(shared, file, count, turns):
    chats = [to_messages(row) for row in rows_of(shared / "data" / file)]
    roles = Counter(message["role"] for chat in chats for message in chat)
    assert len(chats) == count
    assert roles == (turns or roles)
    assert roles.keys() <= set(ROLES.values())
    assert all(chat[-1]["role"] == "assistant" and chat[-1]["content"] for chat in chats)
