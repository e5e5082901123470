"""A chat of a known shape is rendered once, and its messages are where measuring would have found them."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import TEMPLATES, chat, real_tokenizer, tokenizer_like, tokenizer_with

from kvfuse.errors import PromptError
from kvfuse.prompts.chat import _LAYOUTS, MAX_LAYOUTS, render

REAL = ("qwen3", "qwen2.5", "llama-3.2", "phi-4")
EACH = "{% for m in messages %}"
TRICKS = {
    "no literals": EACH + "{{ m.content }}{% endfor %}",
    "one letter between": EACH + "a{{ m.content }}{% endfor %}a",
    "order by content": "{% for m in messages | sort(attribute='content') %}a{{ m.content }}{% endfor %}",
    "reversed on a word": "{% for m in (messages | reverse if 'b' in messages[0].content else messages) %}"
    "{{ m.content }}{% endfor %}",
    "a letter moves on a word": EACH + "{% if 'b' in m.content %}{{ m.content }}a{% else %}a{{ m.content }}{% endif %}"
    "{% endfor %}",
    "a letter unless it is there": EACH + "{{ '' if m.content.startswith('a') else 'a' }}{{ m.content }}{% endfor %}",
    "a letter removed": EACH + "a{{ m.content.lstrip('a') }}{% endfor %}",
    "equal ones once": "{% set ns = namespace(last='') %}" + EACH + "[{{ m.content if m.content != ns.last }}]"
    "{% set ns.last = m.content %}{% endfor %}",
    "first again": EACH + "{{ m.content }}{% endfor %}{{ messages[0].content if 'b' in messages[0].content }}",
    "a letter moves if the second is empty": EACH + "{{ '' if messages[1].content else 'a' }}{{ m.content }}"
    "{{ 'a' if messages[1].content }}{% endfor %}",
    "two letters": EACH + "{{ m.content | replace('ab', 'ba') }}a{% endfor %}",
}


def outcome(messages, tokenizer, **options):
    """Text and spans, or the error."""
    try:
        return render(messages, tokenizer, **options)
    except PromptError as error:
        return str(error)


def measured(messages, tokenizer, **options):
    """The outcome where no chat has been seen before."""
    _LAYOUTS.pop(tokenizer, None)
    return outcome(messages, tokenizer, **options)


def in_place_of(contents, messages):
    """Another chat of the shape: other contents, but empty where they are empty."""
    return [
        {**message, "content": message["content"] and (content or "x")}
        for message, content in zip(messages, contents, strict=True)
    ]


def check_after(first, then, tokenizer):
    """Seeing one chat before changes nothing of another, nor does seeing that one again."""
    expected = measured(then, tokenizer)
    measured(first, tokenizer)
    assert outcome(then, tokenizer) == expected
    assert outcome(then, tokenizer) == expected


@pytest.fixture
def renderings(monkeypatch):
    """Counts how often a tiny tokenizer's template is rendered."""
    count = []
    kind = type(tokenizer_like("verbatim"))
    apply = kind.apply_chat_template
    monkeypatch.setattr(
        kind, "apply_chat_template", lambda *args, **options: count.append(1) or apply(*args, **options)
    )
    return count


@st.composite
def chats_of_a_shape(draw, tokenizer):
    """Two chats of one shape, from words, what the template writes, and each other's contents."""
    size, system = draw(st.sampled_from([1, 3, 3, 5])), draw(st.booleans())
    words = ["a", "user", "</think>", "<think>", "/no_think", "<|im_end|>", " ", "\n\n", '"', "hi there", "\U00040000"]
    plain = chat(*"x" * size, system="x" if system else None)
    measured(plain, tokenizer)
    words += [literal for layout in _LAYOUTS.get(tokenizer, {}).values() for literal in layout.literals if literal]
    pool = draw(st.lists(st.lists(st.sampled_from(words) | st.text(max_size=5), max_size=3).map("".join), min_size=2))
    content = st.lists(st.sampled_from([*pool, "", "b"]), max_size=3).map("".join)
    contents = [draw(content) for _ in range(size - 1 + system)] + ["last" + draw(content)]
    then = chat(*contents[system:], system=contents[0] if system else None)
    return in_place_of([draw(content) for _ in then], then), then


@settings(deadline=None, max_examples=100)
@given(data=st.data(), like=st.sampled_from(list(TEMPLATES)))
def test_messages_are_where_measuring_finds_them(data, like):
    tokenizer = tokenizer_like(like)
    check_after(*data.draw(chats_of_a_shape(tokenizer)), tokenizer)


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(data=st.data(), model=st.sampled_from(REAL))
def test_messages_are_where_measuring_finds_them_in_real_templates(data, model, shared):
    tokenizer = real_tokenizer(shared, model)
    check_after(*data.draw(chats_of_a_shape(tokenizer)), tokenizer)


letters = st.lists(st.sampled_from(["", "a", "b", "aa", "ab", "ba", " ", "aab"]), min_size=3, max_size=3)


@settings(deadline=None, max_examples=200)
@given(first=letters, then=letters, trick=st.sampled_from(list(TRICKS)))
def test_messages_are_where_measuring_finds_them_where_texts_are_ambiguous(first, then, trick):
    messages, tokenizer = chat(*then), tokenizer_with(TRICKS[trick])
    check_after(in_place_of(first, messages), messages, tokenizer)
    check_after(chat(*first), messages, tokenizer)


@pytest.mark.parametrize("like", ["verbatim", "channels", "system in last user"])
def test_a_known_shape_is_rendered_once(like, renderings):
    tokenizer = tokenizer_with(TEMPLATES[like][0])
    render(chat("hi", "yes", "and?", system="Be brief."), tokenizer)
    assert len(renderings) == 2
    render(chat("another", " longer\n", "question?", system="user: hi"), tokenizer)
    assert len(renderings) == 3
    render(chat("another shape"), tokenizer)
    assert len(renderings) == 5


def test_what_a_template_rewrites_is_measured_and_the_layout_stays(renderings):
    tokenizer = tokenizer_with(TEMPLATES["default system"][0])
    render(chat("hi"), tokenizer)
    assert [span.offset for span in render(chat("  trimmed"), tokenizer).spans] == [2]
    before = len(renderings)
    render(chat("again"), tokenizer)
    assert len(renderings) == before + 1


def test_a_template_that_knows_the_date_is_measured_again_the_next_day(monkeypatch, renderings):
    day = ["May 1"]
    clock = SimpleNamespace(now=lambda: SimpleNamespace(strftime=lambda form: day[0]))
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
    tokenizer = tokenizer_with("{{ strftime_now('%d') }}" + EACH + "[{{ m.content }}]{% endfor %}")
    assert render(chat("hi"), tokenizer).spans[0].start == len("May 1[")
    day[0] = "May 10"
    for expected in (4, 5):
        assert render(chat("hi"), tokenizer).spans[0].start == len("May 10[")
        assert len(renderings) == expected


def test_another_template_is_another_shape():
    tokenizer = tokenizer_with(EACH + "a{{ m.content }}{% endfor %}")
    assert render(chat("a"), tokenizer).spans[0].start == 1
    tokenizer.chat_template = EACH + "{{ m.content }}a{% endfor %}"
    assert render(chat("a"), tokenizer).spans[0].start == 0, "the same text"


def test_options_and_special_tokens_are_of_the_shape():
    tokenizer = tokenizer_with(EACH + "{{ m.content }}{% if enable_thinking %}!{% endif %}{{ eos_token }}{% endfor %}")
    for options in ({}, {"enable_thinking": True}):
        assert outcome(chat("!", "!!", "!"), tokenizer, **options) == measured(
            chat("!", "!!", "!"), tokenizer, **options
        )
    render(chat("!"), tokenizer)
    tokenizer.eos_token = "!"
    assert outcome(chat("!"), tokenizer) == measured(chat("!"), tokenizer)


def test_contents_in_parts_are_read_alike_in_a_known_shape():
    tokenizer = tokenizer_with(EACH + "{% if m.content is string %}[{{ m.content }}]{% endif %}{% endfor %}")
    blank, unread = ([{"role": "system", "content": [{"text": text}]}, *chat("hi")] for text in (" ", "text"))
    assert len(render(blank, tokenizer).spans) == 1
    assert render(unread, tokenizer).text == "[text][hi]", "joined, where the parts would be left out"


def test_few_layouts_are_kept_and_none_without_its_tokenizer():
    tokenizer = tokenizer_with(EACH + "[{{ m.content }}]{% endfor %}")
    for turns in (1, *range(3, 2 * MAX_LAYOUTS, 2), 1, *range(101, 105)):
        render(chat(*["hi"] * turns), tokenizer)
    layouts = _LAYOUTS[tokenizer]
    assert len(layouts) == MAX_LAYOUTS
    assert {len(layout.order) for layout in layouts.values()} >= {1, 101, 102, 103, 104}, "the last used ones"
    tokenizer_left = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert tokenizer_left() is None


def test_threads_share_layouts():
    tokenizer = tokenizer_with(EACH + "[{{ m.content }}]{% endfor %}")
    prompts = [chat(*["hi" * (i % 7 + 1)] * (i % 80 + 1)) for i in range(400)]
    with ThreadPoolExecutor(8) as threads:
        rendered = list(threads.map(lambda prompt: render(prompt, tokenizer), prompts))
    assert rendered == [measured(prompt, tokenizer) for prompt in prompts]
