"""Routing and cascade: one of the two models answers, chosen by the question or by the receiver's confidence.

The sharer answers where its score for a prompt exceeds a threshold, which is given, or chosen so that the sharer
answers a given share of a run's prompts.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvfuse.errors import MethodError
from kvfuse.language_model import LanguageModel
from kvfuse.methods.base import Method, OptionScore, Reply, by_choice, to_replies
from kvfuse.methods.single import Single
from kvfuse.prompts.messages import Prompt

PROMPTS_PER_BATCH = 32  # of :meth:`_TwoModels.prepare`


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
            loss = nn.functional.binary_cross_entropy_with_logits(self(bags), sharer_is_better.float())
            loss = loss + decay * self.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(loss)


def bag_of_tokens(prompts: Sequence[Prompt], model: LanguageModel) -> Tensor:
    """``(B, vocabulary)`` float32: 1 where a token of the model occurs in a prompt, else 0."""
    bags = torch.zeros(len(prompts), len(model.tokenizer))
    for row, tokenized in enumerate(Single("receiver", model).tokenize(prompts)):
        bags[row, torch.from_numpy(tokenized.ids)] = 1
    return bags


@dataclass(eq=False, kw_only=True)
class _TwoModels(Method):
    """The sharer answers where its score for a prompt exceeds a threshold, the receiver elsewhere.

    Attributes:
        receiver: Answers at or below the threshold.
        sharer: Answers above it.
        threshold: Of the scores. Default: 0, or with a ``share`` what :meth:`prepare` chooses.
        share: Share of a run's prompts, 0 to 1, that the sharer answers.
    """

    receiver: Single
    sharer: Single
    threshold: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is None and self.share is None:
            self.threshold = 0.0

    @abstractmethod
    def sharer_scores(self, prompts: Sequence[Prompt]) -> list[float]:
        """A score for each prompt; the sharer answers those with the largest."""

    def prepare(self, prompts: Sequence[Prompt], **options: Any) -> None:
        """See :class:`Method`; chooses the threshold where a share is given."""
        if self.share is not None:
            # the scores of all prompts, a few at a time
            scores: list[float] = []
            for start in range(0, len(prompts), PROMPTS_PER_BATCH):
                scores += self.sharer_scores(prompts[start : start + PROMPTS_PER_BATCH])
            self.threshold = threshold_for(self.share, scores)

    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """See :class:`Method`."""
        to_sharer = self.to_sharer(self.sharer_scores(prompts))
        return by_choice(to_sharer, prompts, options, if_false=self.receiver.score, if_true=self.sharer.score)

    def to_sharer(self, scores: Sequence[float]) -> list[bool]:
        """Whether the sharer answers, for each score."""
        if self.threshold is None:
            raise MethodError(
                "expected all prompts of a run, of which the sharer gets a share, got none; "
                f"call prepare of {self.name} first"
            )
        return [score > self.threshold for score in scores]


@dataclass(eq=False, kw_only=True)
class Routed(_TwoModels):
    """Routing: a router reads the question and chooses the model that answers.

    Attributes:
        router: Trained on the receiver's tokens. Without a ``share`` the sharer answers the questions for which the
            router prefers it.
    """

    name = "routing"
    router: Router

    @torch.no_grad()
    def sharer_scores(self, prompts: Sequence[Prompt]) -> list[float]:
        """The router's logits, above zero for the sharer."""
        return self.router(bag_of_tokens(prompts, self.receiver.model)).tolist()

    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """See :class:`Method`."""
        receiver, sharer = partial(self.receiver.reply, **options), partial(self.sharer.reply, **options)
        return by_choice(self.to_sharer(self.sharer_scores(prompts)), prompts, if_false=receiver, if_true=sharer)

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """See :class:`Method`."""
        (to_sharer,) = self.to_sharer(self.sharer_scores([prompt]))
        return (self.sharer if to_sharer else self.receiver).stream(prompt, **options)


@dataclass(eq=False, kw_only=True)
class Cascade(_TwoModels):
    """Cascade: the receiver answers first; where its confidence is too low, the sharer answers instead.

    The confidence is the probability of the least likely token of the answer; the score is its negative. Options are
    scored by the model that would answer: the receiver generates an answer for them too.

    Attributes:
        options: Of ``generate``, for answers generated before options are scored; updated by :meth:`prepare`.
    """

    name = "cascade"
    options: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 32, "do_sample": False})

    def prepare(self, prompts: Sequence[Prompt], **options: Any) -> None:
        """See :class:`Method`."""
        self.options.update(options)
        super().prepare(prompts)

    def sharer_scores(self, prompts: Sequence[Prompt]) -> list[float]:
        """The receiver's negative confidences."""
        return [-confidence for confidence in confident_replies(prompts, self.receiver.model, **self.options)[1]]

    def reply(self, prompts: Sequence[Prompt], **options: Any) -> list[Reply]:
        """See :class:`Method`."""
        # 1) the receiver answers everything
        replies, confidences = confident_replies(prompts, self.receiver.model, **options)

        # 2) the sharer answers again where the confidence is low; the rejected answer counts towards the cost
        def ask_sharer(prompts: Sequence[Prompt], rejected: Sequence[Reply]) -> list[Reply]:
            replies = zip(self.sharer.reply(prompts, **options), rejected, strict=True)
            return [reply.plus(tokens=first.tokens, tokens_in=first.tokens_in) for reply, first in replies]

        to_sharer = self.to_sharer([-confidence for confidence in confidences])
        return by_choice(to_sharer, prompts, replies, if_false=lambda _, accepted: accepted, if_true=ask_sharer)


def confident_replies(
    prompts: Sequence[Prompt], model: LanguageModel, **options: Any
) -> tuple[list[Reply], list[float]]:
    """A model's replies, each with its confidence: the probability of its least likely token."""
    single = Single("receiver", model)
    batch = single.batch(single.tokenize(prompts))
    output = single.decode(batch, **{**options, "return_dict_in_generate": True, "output_logits": True})
    new_ids = output.sequences[:, batch.ids.shape[1] :]  # (B, new)
    replies = to_replies(output.sequences, batch, model)
    # the probability of each generated token
    probabilities = torch.stack(output.logits, 1).float().softmax(-1)  # (B, new, vocabulary)
    probabilities = probabilities.gather(2, new_ids[..., None])[..., 0]  # (B, new)
    # the least of each reply, without the padding after its end
    confidences = [float(row[: reply.tokens].min()) for row, reply in zip(probabilities, replies, strict=True)]
    return replies, confidences


def threshold_for(share: float, scores: Sequence[float]) -> float:
    """The threshold that a given share of the scores exceeds: halfway between two scores, which is robust to rounding.

    Example:
        ``threshold_for(0.5, [4.0, 1.0, 2.0, 3.0])`` is 2.5.
    """
    # infinite bounds, for a share of 0 or 1
    descending = np.sort(scores)[::-1]
    above = round(share * len(descending))
    bounds = np.concatenate([[np.inf], descending, [-np.inf]])
    return float(bounds[above : above + 2].mean())
