"""The tokens that end a response: the one to learn, and all that stop a generation.

Models have several, and they may differ: the token that the chat template writes behind an assistant's turn
(``<end_of_turn>``), the tokenizer's end-of-sequence token (``<eos>``), and those of the generation configuration.
"""

from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from kvfuse.errors import PromptError
from kvfuse.prompts.chat import render
from kvfuse.prompts.messages import Message

CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]

_TURN_ENDS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, int | None]] = WeakKeyDictionary()
"""Per tokenizer the tokens that its templates end a turn with."""


def end_id(tokenizer: PreTrainedTokenizerBase, *, templated: bool = True) -> int | None:
    """The token that ends a response; None for a tokenizer that has none.

    Args:
        tokenizer: The tokenizer of the model that responds.
        templated: Whether the response follows a chat as its template writes it, and so ends as a turn does; plain text
            ends with the end-of-sequence token.
    """
    turn_end = _turn_end(tokenizer) if templated else None
    return tokenizer.eos_token_id if turn_end is None else turn_end


def end_ids(tokenizer: PreTrainedTokenizerBase, *configs: Any) -> list[int]:
    """All tokens that stop a generation, without repetition; empty for a model that has none.

    Args:
        tokenizer: The tokenizer of the model that responds.
        configs: Generation configurations, of which each may add one token or several.
    """
    ids: list[int | None] = [end_id(tokenizer), tokenizer.eos_token_id]
    for config in configs:
        listed = getattr(config, "eos_token_id", None)
        ids += listed if isinstance(listed, list | tuple) else [listed]
    return list(dict.fromkeys(index for index in ids if index is not None))


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template writes behind an assistant's turn, if it writes one."""
    if not tokenizer.chat_template:
        return None
    ends = _TURN_ENDS.setdefault(tokenizer, {})
    key = repr((tokenizer.chat_template, tokenizer.special_tokens_map, len(tokenizer)))
    if key not in ends:
        try:
            ends[key] = _find_turn_end(tokenizer)
        except PromptError:  # the template refuses the chat
            ends[key] = None
    return ends[key]


def _find_turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    # 1) What the template writes behind a chat that ends with an answer
    written = _behind(CHAT, tokenizer, add_generation_prompt=False)
    end = _first_token(written, tokenizer)
    # 2) Not the beginning of the next answer, which some templates write unasked
    unasked = written == _behind(CHAT, tokenizer, add_generation_prompt=True)
    return None if unasked and end == _first_token(_behind(CHAT[:1], tokenizer), tokenizer) else end


def _behind(chat: list[Message], tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """The text that the template writes behind the last message."""
    rendered = render(chat, tokenizer, **options)
    ends = [span.end for span in rendered.spans if span.message == len(chat) - 1]
    return rendered.text[max(ends, default=len(rendered.text)) :]


def _first_token(text: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The added token, special or not, that a text begins with, white space aside."""
    text = text.lstrip()
    added = {added.content: index for index, added in tokenizer.added_tokens_decoder.items()}
    return added.get(max(filter(text.startswith, filter(str.strip, added)), key=len, default=""))
