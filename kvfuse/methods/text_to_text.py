"""The baseline that Cache-to-Cache is held against, the sharer writes a hint and the receiver reads it; and the two together."""

from collections.abc import Callable, Sequence
from typing import Any

from kvfuse.language_model import LanguageModel
from kvfuse.methods.augmented import Augmented, AugmentedPrompt
from kvfuse.methods.base import Method, Reply
from kvfuse.methods.single import Single
from kvfuse.prompts.chat import Message, Prompt, as_chat
from kvfuse.stages.phases import phase

HINT_REQUEST = (
    "Somebody else will be asked the question below. Do not answer it. Say in one clear sentence which background knowledge "
    "matters most for it.\n\n{question}"
)


class TextToText(Augmented):
    """Two models that talk in text.

    Args:
        reader: Answers, having read the hint.
        writer: The model that writes the hint.
        request: What the writer is asked, with ``{question}``.
        reading: What the reader is asked, with ``{hint}`` and ``{question}``; by default it reads the request and the hint as
            two turns of a chat before the question (the form of the reference).
        hint_tokens: Longest hint.
        without_options: The prompt without its options, for a writer that is not to see them, as in the reference.
    """

    name = "text-to-text"

    def __init__(
        self,
        reader: Method,
        writer: LanguageModel,
        request: str = HINT_REQUEST,
        reading: str | None = None,
        hint_tokens: int = 256,
        without_options: Callable[[Prompt], Prompt] | None = None,
    ) -> None:
        super().__init__(reader)
        self.writer, self.request, self.reading, self.hint_tokens = (
            Single("sharer", writer),
            request,
            reading,
            hint_tokens,
        )
        self.without_options = without_options or (lambda prompt: prompt)

    def hints(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """What the sharer writes for each prompt, greedily unless said otherwise."""
        with phase("hint"):
            return self.writer.reply(
                list(map(self._ask, prompts)), **{"do_sample": False, **options, "max_new_tokens": self.hint_tokens}
            )

    def augment(self, prompts: Sequence[Prompt], **options: Any) -> list[AugmentedPrompt]:
        """The prompts with their hints."""
        hints = self.hints(prompts, **options)
        return [
            AugmentedPrompt(self._tell(one, hint.text), hint.tokens, hint.tokens_in)
            for one, hint in zip(prompts, hints, strict=True)
        ]

    def _ask(self, prompt: Prompt) -> list[Message]:
        return _reworded(self.without_options(prompt), self.request)

    def _tell(self, prompt: Prompt, hint: str) -> list[Message]:
        if self.reading is not None:
            return _reworded(prompt, self.reading, hint=hint)
        return [*self._ask(prompt), {"role": "assistant", "content": hint}, as_chat(prompt)[-1]]


class Hybrid(TextToText):
    """Text and caches together (the paper's T-C2C): all models read the hint, and the receiver answers from their fused caches."""

    name = "hybrid"


def _reworded(prompt: Prompt, wording: str, **parts: str) -> list[Message]:
    """The chat with its last message put into the wording."""
    *before, last = as_chat(prompt)
    return [*before, {**last, "content": wording.format(question=last["content"], **parts)}]
