"""Methods that answer a longer prompt: the question with further text to read."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvfuse.methods.base import Method, OptionScore, Reply
from kvfuse.prompts.messages import Message, Prompt, as_chat


@dataclass(frozen=True)
class AugmentedPrompt:
    """A prompt with further text, and the tokens generated and read to write that text."""

    prompt: Prompt
    tokens: int = 0
    tokens_in: int = 0


@dataclass(eq=False)
class Augmented(Method):
    """A method whose prompts are augmented, then answered by another method.

    Attributes:
        reader: The method that answers.
    """

    reader: Method

    def __post_init__(self) -> None:
        self.fuses = self.reader.fuses

    @abstractmethod
    def augment(self, prompts: Sequence[Prompt], **options: Any) -> list[AugmentedPrompt]:
        """The prompts that ``reader`` answers; ``options`` as in :meth:`Method.reply`."""

    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """See :class:`Method`."""
        augmented = self.augment(prompts, **options)
        replies = self.reader.reply([item.prompt for item in augmented], **options)
        return [
            reply.plus(tokens=item.tokens, tokens_in=item.tokens_in)
            for reply, item in zip(replies, augmented, strict=True)
        ]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """See :class:`Method`."""
        return self.reader.stream(self.augment([prompt], **options)[0].prompt, **options)

    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """See :class:`Method`."""
        return self.reader.score([item.prompt for item in self.augment(prompts)], options)


@dataclass(eq=False)
class FewShot(Augmented):
    """The same examples before every question.

    Attributes:
        reader: The method that answers.
        examples: Messages of user and assistant by turns.
    """

    name = "few-shot"
    examples: Sequence[Message]

    def augment(self, prompts: Sequence[Prompt], **options: Any) -> list[AugmentedPrompt]:
        """See :class:`Augmented`; the examples follow the system messages."""
        return [AugmentedPrompt(self._with_examples(as_chat(prompt))) for prompt in prompts]

    def _with_examples(self, chat: Sequence[Message]) -> list[Message]:
        start = next((index for index, message in enumerate(chat) if message["role"] != "system"), len(chat))
        return [*chat[:start], *self.examples, *chat[start:]]
