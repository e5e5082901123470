"""Methods that answer another prompt than they are asked: the same question with something more to read."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvfuse.methods.base import Method, OptionScore, Reply
from kvfuse.prompts.chat import Message, Prompt, as_chat


@dataclass(frozen=True)
class AugmentedPrompt:
    """What is answered in place of a prompt, and how many tokens were generated and read to come by it."""

    prompt: Prompt
    tokens: int = 0
    tokens_in: int = 0


class Augmented(Method):
    """Another method answers what :meth:`augment` makes of the prompts.

    Args:
        reader: The method that answers.
    """

    def __init__(self, reader: Method) -> None:
        self.reader, self.fuses = reader, reader.fuses

    @abstractmethod
    def augment(self, prompts: Sequence[Prompt], **options: Any) -> list[AugmentedPrompt]:
        """What is answered in place of the prompts; ``options`` as in :meth:`Method.reply`."""

    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """See :class:`Method`."""
        augmented = self.augment(prompts, **options)
        replies = self.reader.reply([one.prompt for one in augmented], **options)
        return [
            Reply(reply.text, reply.tokens + one.tokens, reply.tokens_in + one.tokens_in)
            for reply, one in zip(replies, augmented, strict=True)
        ]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """See :class:`Method`."""
        return self.reader.stream(self.augment([prompt], **options)[0].prompt, **options)

    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """See :class:`Method`."""
        return self.reader.score([one.prompt for one in self.augment(prompts)], options)


class FewShot(Augmented):
    """The same examples, questions and answers, stand before every question.

    Args:
        reader: The method that answers.
        examples: Messages of user and assistant by turns.
    """

    name = "few-shot"

    def __init__(self, reader: Method, examples: Sequence[Message]) -> None:
        super().__init__(reader)
        self.examples = list(examples)

    def augment(self, prompts: Sequence[Prompt], **options: Any) -> list[AugmentedPrompt]:
        """The examples go behind what the system says."""
        return [AugmentedPrompt(self._with_examples(as_chat(prompt))) for prompt in prompts]

    def _with_examples(self, chat: Sequence[Message]) -> list[Message]:
        start = next((place for place, message in enumerate(chat) if message["role"] != "system"), len(chat))
        return [*chat[:start], *self.examples, *chat[start:]]
