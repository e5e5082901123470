"""The baseline that Cache-to-Cache is held against: the sharer writes a hint, the receiver reads it."""

from collections.abc import Sequence
from typing import Any

from kvfuse.chat import Message, Prompt, as_chat
from kvfuse.language_model import LanguageModel
from kvfuse.methods.contract import Method, Reply
from kvfuse.methods.single import Single


class TextToText(Method):
    """Two models that talk in text.

    Args:
        receiver: The model that answers.
        sharer: The model that writes the hint.
        request: What the sharer is asked, with ``{question}``.
        reading: What the receiver is asked, with ``{hint}`` and ``{question}``.
        hint_tokens: Longest hint.
    """

    name = "text-to-text"

    def __init__(self, receiver: LanguageModel, sharer: LanguageModel, request: str, reading: str, hint_tokens: int = 256) -> None:
        self.receiver, self.sharer = Single("receiver", receiver), Single("sharer", sharer)
        self.request, self.reading, self.hint_tokens = request, reading, hint_tokens

    def hints(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """What the sharer writes for each prompt."""
        asked = [_reworded(prompt, self.request) for prompt in prompts]
        return self.sharer.reply(asked, **{**options, "max_new_tokens": self.hint_tokens})

    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """See :class:`Method`."""
        hints = self.hints(prompts, **options)
        told = [_reworded(prompt, self.reading, hint=hint.text) for prompt, hint in zip(prompts, hints, strict=True)]
        replies = self.receiver.reply(told, **options)
        return [Reply(reply.text, reply.tokens + hint.tokens) for reply, hint in zip(replies, hints, strict=True)]


def _reworded(prompt: Prompt, wording: str, **parts: str) -> list[Message]:
    """The chat with its last message put into the wording."""
    *before, last = as_chat(prompt)
    return [*before, {**last, "content": wording.format(question=last["content"], **parts)}]
