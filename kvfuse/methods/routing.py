"""One of the two models answers: chosen by the question alone, or by how sure the receiver is."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvfuse.chat import Prompt
from kvfuse.decode import decode
from kvfuse.language_model import LanguageModel
from kvfuse.methods.contract import Method, Reply, to_replies
from kvfuse.methods.single import Single
from kvfuse.reading import read
from kvfuse.token_alignment import pad_left


class Router(nn.Module):
    """Logistic regression on the words of a question: is the sharer the better choice?

    Attributes:
        weight: ``(vocabulary + 1,)`` float32, one weight per receiver token that occurs; the last is the bias.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocabulary + 1))

    def forward(self, bags: Tensor) -> Tensor:
        """``(B, vocabulary)`` 0/1 -> ``(B,)`` logits, above zero for the sharer."""
        return bags @ self.weight[:-1] + self.weight[-1]

    def fit(self, bags: Tensor, sharer_is_better: Tensor, decay: float = 1e-3) -> None:
        """Fit by L-BFGS with an L2 penalty.

        Args:
            bags: ``(N, vocabulary)`` 0/1.
            sharer_is_better: ``(N,)`` 0/1.
            decay: Weight of the penalty.
        """
        optimizer = torch.optim.LBFGS([self.weight], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (
                nn.functional.binary_cross_entropy_with_logits(self(bags), sharer_is_better.float()) + decay * self.weight.square().sum()
            )
            value.backward()
            return value

        optimizer.step(loss)


def bag_of_tokens(prompts: Sequence[Prompt], model: LanguageModel) -> Tensor:
    """``(B, vocabulary)`` float32: which of the model's tokens occur in each prompt."""
    bags = torch.zeros(len(prompts), len(model.tokenizer))
    for row, prompt in enumerate(prompts):
        bags[row, torch.from_numpy(read(prompt, model.tokenizer).ids)] = 1
    return bags


class Routed(Method):
    """A router reads the question and names the model that answers."""

    name = "routing"

    def __init__(self, receiver: LanguageModel, sharer: LanguageModel, router: Router) -> None:
        self.receiver, self.sharer, self.router = Single("receiver", receiver), Single("sharer", sharer), router

    @torch.no_grad()
    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """See :class:`Method`."""
        to_sharer = (self.router(bag_of_tokens(prompts, self.receiver.model)) > 0).tolist()
        return _by_choice(
            prompts, to_sharer, lambda some: self.receiver.reply(some, **options), lambda some: self.sharer.reply(some, **options)
        )


class Cascade(Method):
    """The receiver answers first; where it is less sure than a threshold, the sharer answers instead.

    Args:
        receiver: The first.
        sharer: The second.
        threshold: Least probability of the receiver's least likely token.
    """

    name = "cascade"

    def __init__(self, receiver: LanguageModel, sharer: LanguageModel, threshold: float) -> None:
        self.receiver, self.sharer, self.threshold = receiver, Single("sharer", sharer), threshold

    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """See :class:`Method`."""
        first, sure = confident_replies(prompts, self.receiver, **options)
        unsure = [confidence < self.threshold for confidence in sure]
        known = dict(zip(map(id, prompts), first, strict=True))

        def second(some: Sequence[Prompt]) -> list[Reply]:
            again = self.sharer.reply(some, **options)
            return [Reply(reply.text, reply.tokens + known[id(prompt)].tokens) for prompt, reply in zip(some, again, strict=True)]

        return _by_choice(prompts, unsure, lambda some: [known[id(prompt)] for prompt in some], second)


def confident_replies(prompts: Sequence[Prompt], model: LanguageModel, **options: Any) -> tuple[list[Reply], list[float]]:
    """A model's replies, each with the probability of its least likely token."""
    readings = [read(prompt, model.tokenizer) for prompt in prompts]
    ids, mask = pad_left([reading.ids for reading in readings], readings[0].pad_id)
    options = {**options, "pad_token_id": readings[0].pad_id, "return_dict_in_generate": True, "output_logits": True}
    output = decode(model.model, ids, mask, None, **options)
    replies = to_replies(output.sequences[:, ids.shape[1] :], model)
    chosen = output.sequences[:, ids.shape[1] :, None]
    likely = torch.stack(output.logits, 1).float().softmax(-1).gather(2, chosen)[..., 0]  # (B, new)
    return replies, [float(row[: reply.tokens].min()) for row, reply in zip(likely, replies, strict=True)]


def _by_choice(
    prompts: Sequence[Prompt],
    second: Sequence[bool],
    answer_first: Callable[[Sequence[Prompt]], list[Reply]],
    answer_second: Callable[[Sequence[Prompt]], list[Reply]],
) -> list[Reply]:
    """Answer each prompt by the first or the second, in the order of the prompts."""
    replies: dict[int, Reply] = {}
    for wanted, answer in ((False, answer_first), (True, answer_second)):
        rows = [row for row, chosen in enumerate(second) if chosen == wanted]
        if rows:
            replies.update(zip(rows, answer([prompts[row] for row in rows]), strict=True))
    return [replies[row] for row in range(len(prompts))]
