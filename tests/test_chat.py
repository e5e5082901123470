import pytest

from kvfuse.chat import render
from kvfuse.errors import PromptError
from kvfuse.testing import tiny_tokenizer

CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "user"}, {"role": "user", "content": "user"}],
    [{"role": "user", "content": "same"}, {"role": "assistant", "content": "same"}, {"role": "user", "content": "same"}],
    [{"role": "user", "content": "  spaces around \n"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "after an empty one"}],
]


@pytest.mark.parametrize("template", ["tagged", "lines"])
@pytest.mark.parametrize("chat", CHATS)
def test_spans_hold_the_messages(chat, template):
    rendered = render(chat, tiny_tokenizer(template=template))
    for message, span in zip(chat, rendered.spans, strict=True):
        text = rendered.text[span.start : span.end]
        assert text == (message["content"] if template == "tagged" else message["content"].strip())
        assert message["content"][span.skipped :].startswith(text)


def test_plain_text_is_one_message():
    rendered = render("as it is", tiny_tokenizer())
    assert (rendered.text, rendered.templated) == ("as it is", False)


def test_without_a_template_messages_are_joined():
    rendered = render(CHATS[2], tiny_tokenizer(template=None))
    assert rendered.text == "same\nsame\nsame"
    assert [rendered.text[span.start : span.end] for span in rendered.spans] == ["same"] * 3


@pytest.mark.parametrize("prompt", ["", " \n", [], [{"role": "user", "content": " "}]])
def test_empty_prompt_is_refused(prompt):
    with pytest.raises(PromptError, match="empty"):
        render(prompt, tiny_tokenizer())


def test_message_without_text_is_refused():
    with pytest.raises(PromptError, match="without text"):
        render([{"role": "user", "content": None}], tiny_tokenizer())


@pytest.mark.parametrize("body", ["{{ message.content | upper }}", "", "{{ message.content }}{{ message.content }}"])
def test_template_that_rewrites_messages_is_refused(body):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<|user|>" + body + "{% endfor %}"
    with pytest.raises(PromptError, match="chat template"):
        render([{"role": "user", "content": "word"}, {"role": "user", "content": "other"}], tokenizer)
