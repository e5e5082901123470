"""Chat templates like those of many families, each with what it keeps of a message; chats and tokenizers for them."""

from functools import cache

from transformers import AutoTokenizer

from kvfuse.testing import tiny_tokenizer

ALTERNATE = (
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}"
)

VERBATIM = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<system>You are a helpful assistant. "
    "Today is {{ strftime_now('%d %B %Y') }}.</system>{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content | trim }}</{{ message.role }}>{% endfor %}"
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}<assistant>"
)
SYSTEM_IN_USER = (
    "{% set first = '' %}{% if messages[0].role == 'system' %}{% set first = messages[0].content.strip() ~ '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}" + ALTERNATE + "<turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ first if loop.first else '' }}{{ message.content | trim }}</turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
SYSTEM_IN_LAST_USER = (
    "{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% set ns.system = message.content %}"
    "{% elif message.role == 'user' %}[INST] {% if loop.last and ns.system %}"
    "{{ ns.system + '\\n\\n' }}{% endif %}{{ message.content }}[/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
THOUGHTS_DROPPED = (
    "{%- macro said(content) -%}"
    "{{ content.split('</think>')[-1].lstrip('\\n') if '</think>' in content else content }}{%- endmacro -%}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}Assistant: {{ said(message.content) }}{{ eos_token }}"
    "{% else %}{{ message.role | capitalize }}: {{ message.content }}\n\n{% endif %}{% endfor %}Assistant:"
)
FLAGS_REMOVED = (
    "{% set ns = namespace(think=true) %}{% for message in messages %}{% set content = message.content %}"
    "{% if message.role == 'system' %}{% if '/no_think' in content %}{% set ns.think = false %}{% endif %}"
    "{% set content = content.replace('/no_think', '').rstrip() %}{% endif %}"
    "<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}<think>\n\n</think>\n{{ content.lstrip('\\n') }}"
    "{% else %}{{ content }}{% endif %}"
    "<|end|>{% endfor %}<|assistant|>{% if not ns.think %}<think></think>{% endif %}"
)
ODD_LITERALS = (  # a real line break, escapes and neighbours, as Jinja's strings have them and Python's do not
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' }}"
    "{% if message.role == 'assistant' and '</th' \"ink\\x3e\" in message.content %}"
    "{{ message.content.split('</' 'thin' 'k>') | last }}{% else %}{{ message.content }}{% endif %}"
    "{{ '\n\\'\r\n\\u2028\"' }}{% endfor %}<|assistant|>"
)
CHANNELS = (
    "<|start|>system<|message|>Knowledge: 2024. user, assistant.<|end|>{% for message in messages %}"
    "{% if '<|channel|>' in message.content %}{{ raise_exception('no <|channel|> in contents, please') }}{% endif %}"
    "{% if message.role == 'system' %}<|start|>developer<|message|># Instructions\n\n{{ message.content }}<|end|>"
    "{% elif message.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>"
    "{% elif message.role == 'tool' %}<|start|>tool<|message|>{{ message.content | tojson }}<|end|>"
    "{% else %}<|start|>user<|message|>{{ message.content }}<|end|>{% endif %}{% endfor %}<|start|>assistant"
)
ONE_SPACE = (
    "{% for message in messages %}({{ message.role }}) {{ message.content.split() | join(' ') }}\n{% endfor %}"
    "(assistant)"
)
TWICE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "Again: {{ messages[-1].content }}\n"
)


def verbatim(role, content):
    return content


def trimmed(role, content):
    return content.strip()


def without_thoughts(role, content):
    return content.split("</think>")[-1] if role == "assistant" else content


def without_flags(role, content):
    return content.replace("/no_think", "") if role == "system" else content


TEMPLATES = {
    "verbatim": (VERBATIM, verbatim),
    "default system": (DEFAULT_SYSTEM, trimmed),
    "system in user": (SYSTEM_IN_USER, trimmed),
    "system in last user": (SYSTEM_IN_LAST_USER, verbatim),
    "thoughts dropped": (THOUGHTS_DROPPED, without_thoughts),
    "flags removed": (FLAGS_REMOVED, without_flags),
    "odd literals": (ODD_LITERALS, without_thoughts),
    "channels": (CHANNELS, verbatim),
    "one space": (ONE_SPACE, trimmed),
    "twice": (TWICE, verbatim),
}


def chat(*contents, system=None):
    """A chat of user and assistant by turns."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def tokenizer_with(template, vocab_size=320):
    """A new tiny tokenizer with a chat template of its own."""
    tokenizer = tiny_tokenizer(vocab_size)
    tokenizer.chat_template = template
    return tokenizer


@cache
def tokenizer_like(name):
    return tokenizer_with(TEMPLATES[name][0])


@cache
def real_tokenizer(shared, name):
    return AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
