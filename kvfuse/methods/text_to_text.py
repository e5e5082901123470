"""Text-to-text: the sharer writes a hint and the receiver reads it. The baseline of Cache-to-Cache."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from kvfuse.methods.augmented import Augmented, AugmentedPrompt
from kvfuse.methods.base import Reply
from kvfuse.methods.single import Single
from kvfuse.prompts.messages import Message, Prompt, as_chat
from kvfuse.stages.phases import phase

HINT_REQUEST = (
    "Somebody else will be asked the question below. Do not answer it. Say in one clear sentence which background "
    "knowledge matters most for it.\n\n{question}"
)


@dataclass(eq=False)
class TextToText(Augmented):
    """Two models that communicate in text.

    Attributes:
        reader: The method that answers after reading the hint.
        writer: The model that writes the hint.
        request: Prompt of the writer, with ``{question}``.
        reading: Prompt of the reader, with ``{hint}`` and ``{question}``. Default: the request and the hint are two
            turns of the chat before the question, the form of the reference implementation.
        hint_tokens: Maximum length of the hint.
        without_options: Removes the options from a prompt, for a writer that must not see them, as in the reference.
    """

    name = "text-to-text"
    writer: Single
    _: KW_ONLY
    request: str = HINT_REQUEST
    reading: str | None = None
    hint_tokens: int = 256
    without_options: Callable[[Prompt], Prompt] | None = None

    def hints(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """The writer's hint for each prompt, generated greedily by default."""
        requests = [self._request(prompt) for prompt in prompts]
        options = {"do_sample": False, **options, "max_new_tokens": self.hint_tokens}
        with phase("hint"):
            return self.writer.reply(requests, **options)

    def augment(self, prompts: Sequence[Prompt], **options: Any) -> list[AugmentedPrompt]:
        """See :class:`Augmented`; each prompt gets its hint."""
        hints = self.hints(prompts, **options)
        return [
            AugmentedPrompt(self._with_hint(prompt, hint.text), hint.tokens, hint.tokens_in)
            for prompt, hint in zip(prompts, hints, strict=True)
        ]

    def _request(self, prompt: Prompt) -> list[Message]:
        return _reworded(self.without_options(prompt) if self.without_options else prompt, self.request)

    def _with_hint(self, prompt: Prompt, hint: str) -> list[Message]:
        if self.reading is not None:
            return _reworded(prompt, self.reading, hint=hint)
        return [*self._request(prompt), {"role": "assistant", "content": hint}, as_chat(prompt)[-1]]


class Hybrid(TextToText):
    """Text and caches (the paper's T-C2C): all models read the hint, and ``reader`` answers from their fused caches."""

    name = "hybrid"


def _reworded(prompt: Prompt, template: str, **parts: str) -> list[Message]:
    """The chat with its last message put into a template."""
    *before, last = as_chat(prompt)
    return [*before, {**last, "content": template.format(question=last["content"], **parts)}]
