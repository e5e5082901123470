"""One model answers alone: the receiver, or the sharer."""

from collections.abc import Sequence
from typing import Any

from kvfuse.chat import Prompt
from kvfuse.decode import decode
from kvfuse.language_model import LanguageModel
from kvfuse.methods.contract import Method, Reply, to_replies
from kvfuse.reading import read
from kvfuse.token_alignment import pad_left


class Single(Method):
    """A model on its own.

    Args:
        name: ``receiver`` or ``sharer``.
        model: The model.
    """

    def __init__(self, name: str, model: LanguageModel) -> None:
        self.name, self.model = name, model

    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """See :class:`Method`."""
        readings = [read(prompt, self.model.tokenizer) for prompt in prompts]
        ids, mask = pad_left([reading.ids for reading in readings], readings[0].pad_id)
        generated = decode(self.model.model, ids, mask, None, pad_token_id=readings[0].pad_id, **options)
        return to_replies(generated[:, ids.shape[1] :], self.model)
