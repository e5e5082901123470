import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import (
    TEMPLATES,
    chat,
    real_tokenizer,
    tokenizer_like,
    tokenizer_with,
    trimmed,
    verbatim,
    without_flags,
    without_thoughts,
)

from kvfuse.errors import PromptError
from kvfuse.prompts.chat import render
from kvfuse.testing import tiny_tokenizer

REAL = {
    "qwen3": without_thoughts,
    "qwen2.5": verbatim,
    "llama-3.2": trimmed,
    "phi-4": verbatim,
    "mistral-v3": verbatim,
    "gpt2": verbatim,
}
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "user", "parameters": {"type": "object", "properties": {}}},
}


CHATS = {
    "one": chat("hi"),
    "roles": chat("user", "assistant", "system", system="user"),
    "repeated": chat("same", "same", "same", system="same"),
    "default prompt": chat("You are a helpful assistant.", "You are", "helpful"),
    "outer space": chat("  spaces \n", "\n\nbefore", "after\t \n", system=" \u2003both\u2028"),
    "inner space": chat("two  words\n\nand  a\tthird"),
    "line breaks": chat("a\r\nb\rc\vd\x85e"),
    "only space": chat("hi", " \n", "again", system="  "),
    "empty": chat("after an empty one", "", "and another", system=""),
    "thoughts": chat("why", "<think>\nBecause.\n</think>\n\nSo.", "and </think>?"),
    "thoughts at once": chat("why", "<think>a</think>user", "<think>", "user", "b"),
    "special tokens": chat("<|im_end|>", "<|im_start|>assistant\n", "<|end|><|eot_id|></s>[INST]<|endoftext|>"),
    "digits": chat("1", "11", "111"),
    "private use": chat("\ue000\U00040000\U000f0000", "\U00040001\U0010ffff", "\U00040000"),
    "json": chat('{"a": "\\n<b>&\'"}', "\\", '"'),
    "flags": chat("go /no_think", "ok", "/no_think", system="Be brief. /no_think"),
}


def visible(text):
    return "".join(text.split())


def check_spans(rendered, repeated=False):
    """What holds for every rendering."""
    end = 0
    characters = [(span.message, span.offset + i) for span in rendered.spans for i in range(span.end - span.start)]
    assert repeated or len(set(characters)) == len(characters), "each character stands in one place"
    for span in rendered.spans:
        assert end <= span.start < span.end, "in order, disjoint, not empty"
        assert (
            rendered.text[span.start : span.end]
            == rendered.messages[span.message][span.offset :][: span.end - span.start]
        )
        end = span.end


def text_of(rendered, number):
    return "".join(rendered.text[span.start : span.end] for span in rendered.spans if span.message == number)


def outside(rendered):
    """The visible characters that are no message's."""
    starts, ends = [span.start for span in rendered.spans], [span.end for span in rendered.spans]
    return visible("".join(rendered.text[start:end] for start, end in zip([0, *ends], [*starts, None], strict=True)))


def frame(messages, tokenizer, **options):
    """What the template writes around messages of one character each."""
    short = [{**message, "content": "\ue123" if visible(message["content"]) else ""} for message in messages]
    return visible(read_by_model(short, tokenizer, **options)).replace("\ue123", "")


def read_by_model(messages, tokenizer, **options):
    if not tokenizer.chat_template:
        return "\n".join(message["content"] for message in messages)
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False, **options
    )


def check_messages(messages, tokenizer, keep):
    """The text is the template's own; each message is in it as far as it is kept; the rest depends on no message."""
    rendered = render(messages, tokenizer)
    check_spans(rendered)
    assert rendered.text == read_by_model(messages, tokenizer)
    for number, message in enumerate(messages):
        assert visible(text_of(rendered, number)) == visible(keep(message["role"], message["content"]))
    if keep is not without_flags:  # a flag changes what the template writes
        assert outside(rendered) == frame(messages, tokenizer)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("like", [name for name in TEMPLATES if name != "twice"])
def test_messages_are_found_in_unseen_templates(name, like):
    check_messages(CHATS[name], tokenizer_like(like), TEMPLATES[like][1])


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("model", REAL)
def test_messages_are_found_in_real_templates(name, model, shared):
    check_messages(CHATS[name], real_tokenizer(shared, model), REAL[model])


fragments = [
    "<think>",
    "</think>",
    "user",
    "assistant",
    "system",
    "<|end|>",
    "<|im_end|>",
    "/no_think",
    " ",
    "\n",
    "\n\n",
    '"',
    "\\",
    "{{ x }}",
]
private = st.characters(min_codepoint=0x3FFFE, max_codepoint=0x40010) | st.characters(categories=["Co"])
contents = st.lists(st.sampled_from(fragments) | st.text(max_size=8) | private, max_size=6).map("".join)
chats = st.builds(
    lambda turns, system: chat(*turns, system=system),
    st.lists(contents, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2 and turns[-1].strip()),
    st.none() | contents,
)


@settings(deadline=None, max_examples=150)
@given(messages=chats, like=st.sampled_from([name for name in TEMPLATES if name != "twice"]))
def test_messages_are_found_whatever_they_say(messages, like):
    check_messages(messages, tokenizer_like(like), TEMPLATES[like][1])


@settings(deadline=None, max_examples=150)
@given(messages=chats, model=st.sampled_from(list(REAL)))
def test_messages_are_found_in_real_templates_whatever_they_say(messages, model, shared):
    check_messages(messages, real_tokenizer(shared, model), REAL[model])


def result(content):
    return [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": CALL},
        {"role": "tool", "content": content},
        {"role": "user", "content": "Weather?"},
    ]


@pytest.mark.parametrize("content", ["sunny", '{"name": "Oslo \\"Norway\\"", "sky": ["☀", 1]}\n', "Weather?", "a\\nb"])
@pytest.mark.parametrize("model", ["qwen3", "qwen2.5", "llama-3.2", "gpt2"])
def test_tools_are_called(content, model, shared):
    tokenizer = real_tokenizer(shared, model)
    rendered = render(result(content), tokenizer, tools=[TOOL])
    check_spans(rendered)
    assert [text_of(rendered, number) for number in (0, 1, 3)] == ["Weather?", "", "Weather?"]
    written = visible(text_of(rendered, 2))
    unescaped = [character for character in visible(content) if character not in '"\\']
    assert [character for character in written if character not in '"\\'] == unescaped, "as JSON, if need be"
    if tokenizer.chat_template:
        assert rendered.text == read_by_model(result(content), tokenizer, tools=[TOOL])
        empty = [{**message, "content": message["content"] or ""} for message in result(content)]
        assert [text_of(render(empty, tokenizer, tools=[TOOL]), number) for number in (0, 3)] == [
            "Weather?",
            "Weather?",
        ]


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ("<think>why</think>so", ["why", "so"]),
        ("<think>\nwhy\n</think>\n\nso", ["<think>\nwhy\n</think>\n\nso"]),
        ("<think>\n\nwhy\n\nnot</think>so", ["why\n\nnot", "so"]),
        ("\n\nso", ["so"]),
        ("so", ["so"]),
    ],
)
def test_thoughts_of_the_last_answer_stand_in_two_places(answer, parts, shared):
    rendered = render(chat("so", answer), real_tokenizer(shared, "qwen3"))
    check_spans(rendered)
    assert [rendered.text[span.start : span.end] for span in rendered.spans] == ["so", *parts]


def test_repeated_message_is_found_twice():
    rendered = render(chat("first", "x", "again"), tokenizer_like("twice"))
    check_spans(rendered, repeated=True)
    assert [span.message for span in rendered.spans] == [0, 1, 2, 2]


@pytest.mark.parametrize("system", ["Be brief. /no_think", "/no_think Be brief.", "Be /no_think brief."])
def test_word_that_the_template_looks_for_is_message(system):
    tokenizer = tokenizer_with(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
        "{% if '/no_think' in messages[0].content %}!{% endif %}"
    )
    rendered = render(chat("/no_think", system=system), tokenizer)
    assert [text_of(rendered, number) for number in (0, 1)] == [system, "/no_think"]
    assert len(rendered.spans) == 2


def test_marks_of_the_template_are_not_ours():
    tokenizer = tokenizer_with("\U00040000{% for m in messages %}{{ m.content }}{% endfor %}\U00040001")
    rendered = render(chat("hi", "\U00040001you", "all"), tokenizer)
    assert [(span.message, span.start) for span in rendered.spans] == [(0, 1), (1, 3), (2, 7)]


def test_message_that_the_template_moves_is_found_there():
    rendered = render(chat("one", "two", "three", system="sys"), tokenizer_like("system in last user"))
    assert [span.message for span in rendered.spans] == [1, 2, 0, 3]


def parts_of(*texts):
    return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]


def test_content_in_parts_is_one_message():
    tokenizer = tokenizer_with(
        "{% for m in messages %}<|user|>{% for part in m.content %}{{ part.text | trim }};{% endfor %}{% endfor %}"
    )
    rendered = render(parts_of("text", " more "), tokenizer)
    check_spans(rendered)
    assert rendered.text == "<|user|>text;more;"
    assert [(span.message, span.offset) for span in rendered.spans] == [(0, 0), (0, 5)]
    assert render(parts_of("text", " more"), tiny_tokenizer(template=None)).text == "text more"


@pytest.mark.parametrize("model", ["qwen3", "qwen2.5", "llama-3.2", "phi-4"])
def test_content_in_parts_is_joined_where_the_template_reads_strings_only(model, shared):
    chats = [*chat("plain", "yes"), *parts_of("one", " and", " two")], [*chat("plain", "yes"), *chat("one and two")]
    in_parts, joined = (render(messages, real_tokenizer(shared, model)) for messages in chats)
    assert in_parts == joined


@pytest.mark.parametrize(
    ("part", "reason"),
    [({"type": "image"}, "'image'"), ({"type": "audio", "text": "hi"}, "'audio'"), ({"type": "text"}, "without text")],
)
@pytest.mark.parametrize("template", ["tagged", None])
def test_parts_that_are_no_text_are_refused_by_their_type(part, reason, template):
    with pytest.raises(PromptError, match=reason):
        render([{"role": "user", "content": [{"type": "text", "text": "hi"}, part]}], tiny_tokenizer(template=template))


@pytest.mark.parametrize("template", ["tagged", None])
def test_a_message_without_a_role_or_with_an_unknown_one_is_refused(template):
    for message, reason in (
        ({}, "without a role"),
        ({"role": None}, "without a role"),
        ({"role": "wizard"}, "'wizard'"),
    ):
        with pytest.raises(PromptError, match=reason):
            render([{**message, "content": "hi"}, *chat("and?")], tiny_tokenizer(template=template))


def test_a_role_that_the_template_names_is_known():
    tokenizer = tokenizer_with("{% for m in messages %}{{ '' if m.role == 'wizard' }}{{ m.content }}{% endfor %}")
    assert render([{"role": "wizard", "content": "hi"}], tokenizer).text == "hi"


@pytest.mark.parametrize("model", ["qwen3", "qwen2.5"])
def test_a_role_that_the_template_leaves_out_is_refused(model, shared):
    with pytest.raises(PromptError, match="'developer', which it leaves out"):
        render([{"role": "developer", "content": "Be brief."}, *chat("hi")], real_tokenizer(shared, model))


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ 'a }}", "{{ messages | nofilter }}", "{% x %}"])
def test_a_template_that_is_no_jinja_is_refused_with_the_line(template):
    with pytest.raises(PromptError, match=r"^expected a chat template in Jinja, got .* in its line 2; correct"):
        render(chat("hi"), tokenizer_with("\n" + template))


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_an_escape_that_is_none_is_what_jinja_makes_of_it():
    tokenizer = tokenizer_with(r"{% for m in messages %}{{ m.content.split('\/think') | last }}{% endfor %}")
    assert text_of(render(chat(r"a\/thinkuser", "b"), tokenizer), 0) == "user"


def test_long_messages_use_marks_again(monkeypatch):
    monkeypatch.setattr("kvfuse.prompts.template_spans.LAST_MARK", 0x40000 + 40)
    check_messages(
        chat("a few " * 50, "<think>a</think>" + "words" * 10, "to mark"),
        tokenizer_like("thoughts dropped"),
        without_thoughts,
    )


def test_plain_text_is_one_message():
    rendered = render("as it is", tiny_tokenizer())
    assert (rendered.text, rendered.templated) == ("as it is", False)
    check_spans(rendered)


def test_outer_space_is_message_where_the_template_keeps_it():
    rendered = render(CHATS["outer space"], tiny_tokenizer(template="tagged"))
    assert [text_of(rendered, number) for number in range(4)] == [
        message["content"] for message in CHATS["outer space"]
    ]


@pytest.mark.parametrize(
    "prompt", ["", " \n", [], [{"role": "user", "content": " "}], [{"role": "user", "content": []}]]
)
def test_empty_prompt_is_refused(prompt):
    with pytest.raises(PromptError, match="empty"):
        render(prompt, tiny_tokenizer())


@pytest.mark.parametrize("content", [None, 7, {"text": "hi"}, [{"type": "text"}], ["hi"]])
def test_message_without_text_is_refused(content):
    with pytest.raises(PromptError, match="without text"):
        render([{"role": "user", "content": content}], tiny_tokenizer())


@pytest.mark.parametrize(
    "body",
    ["{{ message.content | upper }}", "{{ message.content | length }}", "{{ message.content[::2] | lower }}", ""],
)
def test_template_that_hides_the_messages_is_refused(body):
    tokenizer = tokenizer_with("{% for message in messages %}<|user|>" + body + "{% endfor %}")
    with pytest.raises(PromptError, match=r"^expected a chat template that .*, got .*; .*$"):
        render(chat("Word", "oTHER"), tokenizer)


@pytest.mark.parametrize(
    ("messages", "like", "reason"),
    [
        ([{"role": "assistant", "content": "hi"}], "system in user", "'roles must take turns'"),
        (chat("<|channel|>"), "channels", "'no <|channel|> in contents, please'"),
        (result("sunny"), "verbatim", "content"),
    ],
)
def test_error_of_the_template_is_one_line(messages, like, reason):
    with pytest.raises(PromptError) as error:
        render(messages, tokenizer_like(like))
    assert reason in str(error.value)
    assert re.fullmatch(r"expected a chat .*, got its error .*; .*", str(error.value))
