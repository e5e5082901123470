"""One of the two models answers: chosen by the question alone, or by how sure the receiver is.

Where the line is drawn is a figure, or follows from the share of a run's questions that the sharer is to answer.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvfuse.errors import MethodError
from kvfuse.language_model import LanguageModel
from kvfuse.methods.base import Method, OptionScore, Reply, by_choice, to_replies
from kvfuse.methods.single import Single
from kvfuse.prompts.alignment import pad_left
from kvfuse.prompts.chat import Prompt
from kvfuse.prompts.tokenized import tokenize
from kvfuse.stages.decode import decode

BATCH = 32  # prompts at once, when all of a run are looked at before it


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
                nn.functional.binary_cross_entropy_with_logits(self(bags), sharer_is_better.float())
                + decay * self.weight.square().sum()
            )
            value.backward()
            return value

        optimizer.step(loss)


def bag_of_tokens(prompts: Sequence[Prompt], model: LanguageModel) -> Tensor:
    """``(B, vocabulary)`` float32: which of the model's tokens occur in each prompt."""
    bags = torch.zeros(len(prompts), len(model.tokenizer))
    for row, prompt in enumerate(prompts):
        bags[row, torch.from_numpy(tokenize(prompt, model.tokenizer).ids)] = 1
    return bags


class _OneOfTwo(Method):
    """The sharer answers where a figure of the prompt lies above a threshold, the receiver elsewhere.

    Args:
        receiver: Answers below.
        sharer: Answers above.
        threshold: None: found by :meth:`prepare`, so that ``share`` of its prompts lie above.
        share: 0 to 1.
    """

    def __init__(
        self, receiver: LanguageModel, sharer: LanguageModel, threshold: float | None, share: float | None
    ) -> None:
        self.receiver, self.sharer = Single("receiver", receiver), Single("sharer", sharer)
        self.threshold, self.share = threshold, share

    @abstractmethod
    def figures(self, prompts: Sequence[Prompt]) -> list[float]:
        """One for each prompt."""

    def prepare(self, prompts: Sequence[Prompt], **options: Any) -> None:
        """Find the threshold, where a share is wanted."""
        if self.share is not None:
            batches = (prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH))
            self.threshold = line_above(self.share, [figure for batch in batches for figure in self.figures(batch)])

    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """See :class:`Method`."""

        def by(model: Single) -> Callable[[list[int]], list[list[OptionScore]]]:
            return lambda rows: model.score([prompts[row] for row in rows], [options[row] for row in rows])

        return by_choice(self.choose(self.figures(prompts)), by(self.receiver), by(self.sharer))

    def choose(self, figures: Sequence[float]) -> list[bool]:
        """Which of them lie above the threshold."""
        if self.threshold is None:
            raise MethodError(
                f"expected all prompts of a run, of which the sharer gets a share, got none; call prepare of {self.name} first"
            )
        return [figure > self.threshold for figure in figures]


class Routed(_OneOfTwo):
    """A router reads the question and names the model that answers.

    Args:
        receiver: One of the two.
        sharer: The other.
        router: Trained for the receiver's tokens.
        share: Of a run's questions, those that the sharer answers; by default as many as the router finds it better for.
    """

    name = "routing"

    def __init__(
        self, receiver: LanguageModel, sharer: LanguageModel, router: Router, share: float | None = None
    ) -> None:
        super().__init__(receiver, sharer, 0.0 if share is None else None, share)
        self.router = router

    @torch.no_grad()
    def figures(self, prompts: Sequence[Prompt]) -> list[float]:
        """The router's logits, above zero for the sharer."""
        return self.router(bag_of_tokens(prompts, self.receiver.model)).tolist()

    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """See :class:`Method`."""

        def by(model: Single) -> Callable[[list[int]], list[Reply]]:
            return lambda rows: model.reply([prompts[row] for row in rows], **options)

        return by_choice(self.choose(self.figures(prompts)), by(self.receiver), by(self.sharer))

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """See :class:`Method`."""
        (to_sharer,) = self.choose(self.figures([prompt]))
        return (self.sharer if to_sharer else self.receiver).stream(prompt, **options)


class Cascade(_OneOfTwo):
    """The receiver answers first; where it is less sure than a threshold, the sharer answers instead.

    How sure it is, is the probability of the least likely token of its answer. Options are scored by the model that would
    answer: for them the receiver answers too, with the options that the run was prepared with.

    Args:
        receiver: The first.
        sharer: The second.
        confidence: Least probability; by default what ``share`` makes it.
        share: Of a run's questions, those that the sharer answers.
    """

    name = "cascade"

    def __init__(
        self,
        receiver: LanguageModel,
        sharer: LanguageModel,
        confidence: float | None = None,
        share: float | None = None,
    ) -> None:
        super().__init__(receiver, sharer, None if confidence is None else -confidence, share)
        self.options: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False}

    def prepare(self, prompts: Sequence[Prompt], **options: Any) -> None:
        """See :class:`Method`."""
        self.options.update(options)
        super().prepare(prompts)

    def figures(self, prompts: Sequence[Prompt]) -> list[float]:
        """How unsure the receiver is."""
        return [-sure for sure in confident_replies(prompts, self.receiver.model, **self.options)[1]]

    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """See :class:`Method`."""
        first, sure = confident_replies(prompts, self.receiver.model, **options)

        def second(rows: list[int]) -> list[Reply]:
            again = self.sharer.reply([prompts[row] for row in rows], **options)
            spent = [(first[row].tokens, first[row].tokens_in) for row in rows]
            return [
                Reply(one.text, one.tokens + new, one.tokens_in + read)
                for one, (new, read) in zip(again, spent, strict=True)
            ]

        return by_choice(self.choose([-one for one in sure]), lambda rows: [first[row] for row in rows], second)


def confident_replies(
    prompts: Sequence[Prompt], model: LanguageModel, **options: Any
) -> tuple[list[Reply], list[float]]:
    """A model's replies, each with the probability of its least likely token."""
    readings = [tokenize(prompt, model.tokenizer) for prompt in prompts]
    ids, mask = pad_left([reading.ids for reading in readings], readings[0].pad_id)
    options = {**options, "pad_token_id": readings[0].pad_id, "return_dict_in_generate": True, "output_logits": True}
    output = decode(model.model, ids, mask, None, phase="receiver_prefill", **options)
    replies = to_replies(output.sequences[:, ids.shape[1] :], model, [len(reading.ids) for reading in readings])
    chosen = output.sequences[:, ids.shape[1] :, None]
    likely = torch.stack(output.logits, 1).float().softmax(-1).gather(2, chosen)[..., 0]  # (B, new)
    return replies, [float(row[: reply.tokens].min()) for row, reply in zip(likely, replies, strict=True)]


def line_above(share: float, figures: Sequence[float]) -> float:
    """A threshold that the given share of the figures lies above, halfway between two of them, so that rounding moves none across."""
    ordered = np.sort(figures)[::-1]
    above = round(share * len(ordered))
    bounds = np.concatenate([[np.inf], ordered, [-np.inf]])
    return float(bounds[above : above + 2].mean())
