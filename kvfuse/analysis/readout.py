"""Caches of a batch of questions, and what the receiver answers from them: its first token, its score of right answers.

All calls of the analyses into a pair's prefill and fuse are here.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from kvfuse.analysis.study import Question, Study
from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import cache_arguments, read_cache, read_only_cache
from kvfuse.errors import PairError
from kvfuse.language_model import LanguageModel
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt, AlignedRow, pad_left, stack
from kvfuse.prompts.message_axis import locate
from kvfuse.prompts.response import stack_responses, tokenize_response
from kvfuse.prompts.tokenized import TokenizedPrompt
from kvfuse.stages.decode import score
from kvfuse.stages.fuse import SelectedTokens

WAYS = ("alone", "fused")
"""The receiver answers from its clean cache, or from the fused one."""
ROLES = ("template", "message", "last token")


@dataclass(frozen=True)
class ReadBatch:
    """A batch of questions and the models' caches of it.

    Attributes:
        pair: The models and fusers.
        questions: The batch, row by row.
        rows: The same, tokenized and aligned.
        prompt: The same, padded: ``(B, T)``.
        prefilled: The receiver's cache of all positions but the last; never overwritten.
        sharers: ``(L_s, B, H_s, T_s, D_s)`` each; empty where the receiver read alone.
    """

    pair: CacheToCache
    questions: Sequence[Question]
    rows: Sequence[AlignedRow]
    prompt: AlignedPrompt
    prefilled: Cache
    sharers: Sequence[KV] = ()

    @cached_property
    def clean(self) -> KV:
        """``(L, B, H, T - 1, D)``: the receiver's own keys and values."""
        return read_cache(self.prefilled)

    @cached_property
    def fused(self) -> KV:
        """``(L, B, H, T - 1, D)``: the same, fused."""
        return self.fuse()

    @torch.no_grad()
    def fuse(self) -> KV:
        """Run the fusers; returns a new :attr:`fused`."""
        return self.pair.fuse_kv(prompt=self.prompt, receiver=self.clean, sharers=self.sharers)

    @property
    def fused_positions(self) -> Tensor:
        """``(B, T - 1)`` bool: the positions that a fuser changes."""
        reached = torch.stack([sharer.index >= 0 for sharer in self.prompt.sharers]).any(0)
        return (self.prompt.fuse_mask & reached)[:, :-1]

    def mix(self, kv: KV, chosen: Tensor) -> KV:
        """Returns ``kv`` where ``chosen``, a bool that broadcasts to ``(L, B, H, T - 1, D)``, else the clean cache."""
        own = self.clean
        return KV(torch.where(chosen, kv.key, own.key), torch.where(chosen, kv.value, own.value))

    def select_tokens(self, like: Tensor) -> SelectedTokens | None:
        """Returns the aligned tokens that the first fuser sees, in the dtype of ``like``; None where there are none."""
        return self.pair.select_tokens(self.prompt, receiver=self.clean, sharer=self.sharers[0], like=like)

    @torch.no_grad()
    def run_last_token(self, kv: KV, **outputs: Any) -> Any:
        """Run the receiver over the last prompt token; its logits are those of the first answer token.

        Args:
            kv: The cache of the other positions, ``(L, B, H, T - 1, D)``; for a batch of one question any number of
                variants of it, ``(L, variants, H, T - 1, D)``.
            outputs: Requested outputs besides logits, e.g. ``output_attentions=True``.

        Returns:
            The model's output for ``(B or variants, 1)`` tokens.
        """
        model, variants = self.pair.receiver.model, kv.key.shape[1] if len(self.rows) == 1 else -1
        # 1) The last token of every row, repeated for the variants of a single prompt.
        inputs = {
            "input_ids": self.prompt.ids[:, -1:],
            "attention_mask": self.prompt.mask,
            "position_ids": self.prompt.positions[:, -1:],
        }
        inputs = {name: tensor.expand(variants, -1).to(model.device) for name, tensor in inputs.items()}
        # 2) Recurrent state is not in kv: repeat it too.
        prefilled = self.prefilled
        if variants > 1:
            prefilled = copy.deepcopy(prefilled)
            prefilled.reorder_cache(torch.zeros(variants, dtype=torch.long, device=kv.key.device))
        # 3) The cache is read only, so that a run leaves no trace.
        return model(**inputs, **outputs, **cache_arguments(read_only_cache(prefilled, kv)))

    def first_logits(self, kv: KV) -> Tensor:
        """``(B or variants, V)`` float32: logits of the first answer token; see :meth:`run_last_token`."""
        return self.run_last_token(kv).logits[:, -1].float()

    @torch.no_grad()
    def score_answers(self, kv: KV) -> np.ndarray:
        """Score the right answers after a cache ``(L, B, H, T - 1, D)``.

        Returns:
            ``(2, B)`` float64: 1 where greedy decoding gives exactly the answer and its end, else 0; and the
            log-probability of both in nats.
        """
        # 1) Tokenize the answers as they follow their prompts.
        receiver = self.pair.receiver
        responses = [
            tokenize_response(row, str(question.answer), receiver.tokenizer, ends=True)
            for row, question in zip(self.rows, self.questions, strict=True)
        ]
        # 2) One run over the last prompt token and all answers.
        tail = stack_responses(self.prompt, responses)  # (B, 1 + R)
        nats, greedy = score(receiver.model, self.prompt, tail, read_only_cache(self.prefilled, kv))
        return torch.stack([greedy.double(), nats.double()]).cpu().numpy()


@torch.no_grad()
def read(pair: CacheToCache, questions: Sequence[Question], shift: int = 0) -> ReadBatch:
    """Prefill a batch of questions with all models.

    Args:
        pair: The models and fusers.
        questions: Prompts of two tokens or more.
        shift: Added to all positions that the models see.
    """
    rows = [pair.align(question.prompt) for question in questions]
    prompt = shift_positions(stack(rows), shift)
    caches = pair.read(prompt)
    return ReadBatch(pair, questions, rows, prompt, caches.receiver, list(map(read_cache, caches.sharers)))


def read_batches(study: Study) -> Iterator[ReadBatch]:
    """Prefill all questions of a study, batch by batch."""
    for indices in study.batches():
        yield read(study.pair, [study.questions[index] for index in indices])


@torch.no_grad()
def read_alone(
    pair: CacheToCache, questions: Sequence[Question], rows: Sequence[TokenizedPrompt], positions: Tensor | None = None
) -> ReadBatch:
    """Prefill questions with the receiver alone.

    Args:
        pair: The models.
        questions: The batch.
        rows: The receiver's tokenization of each.
        positions: ``(B, T)`` int64, instead of the tokens' own.
    """
    aligned = [AlignedRow(row, np.zeros(len(row.ids), dtype=bool), ()) for row in rows]
    prompt = stack(aligned)
    prompt = prompt if positions is None else replace(prompt, positions=positions)
    return ReadBatch(pair, questions, aligned, prompt, pair.read_receiver(prompt))


def shift_positions(prompt: AlignedPrompt, by: int) -> AlignedPrompt:
    """Returns the same batch at positions ``by`` later, for all models."""
    sharers = tuple(replace(sharer, positions=sharer.positions + by) for sharer in prompt.sharers)
    return replace(prompt, positions=prompt.positions + by, sharers=sharers)


def in_message(tokenized: TokenizedPrompt) -> np.ndarray:
    """``(n,)`` bool: the tokens that cover characters of a message."""
    return locate(tokenized).in_message


def roles(tokenized: TokenizedPrompt) -> np.ndarray:
    """``(n,)`` int64: the index in :data:`ROLES` of each token of a prompt."""
    # even: template, odd: message
    role = locate(tokenized).sections % 2
    role[-1] = 2
    return role


def padded_roles(rows: Sequence[AlignedRow]) -> Tensor:
    """``(B, T)`` int64: :func:`roles`, padded left with -1."""
    return pad_left([roles(row.receiver) for row in rows], -1)[0]


def token_texts(tokenized: TokenizedPrompt, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the text of each token, white space made visible."""
    return [visible(tokenizer.decode([token])) for token in tokenized.ids]


def visible(text: str) -> str:
    """Returns a token's text with visible white space, for a picture."""
    return "".join(c if c.isprintable() else "·" for c in text.replace(" ", "·").replace("\n", "⏎"))


def uses_rope(model: LanguageModel) -> bool:
    """Whether a rotary embedding turns the model's keys by their positions."""
    try:
        return bool(model.rope.layers)
    except PairError:
        return False


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """While open, the model computes attention in a way that returns its weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
