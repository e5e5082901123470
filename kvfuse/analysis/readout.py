"""What the receiver makes of a cache that it is given: its first answer token, and how likely it finds the right answers."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvfuse.analysis.study import Question, Study
from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import CACHE, read_cache, read_only_cache
from kvfuse.errors import PairError
from kvfuse.language_model import LanguageModel
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt, AlignedRow, pad_left, stack
from kvfuse.prompts.message_axis import locate
from kvfuse.prompts.response import stack_responses, tokenize_response
from kvfuse.prompts.tokenized import TokenizedPrompt
from kvfuse.stages.decode import score

ROLES = ("template", "message", "last token")


@dataclass(frozen=True)
class Read:
    """A batch of prompts that all models have read.

    Attributes:
        readings: The prompts, row by row.
        prompt: The same as a batch.
        prefilled: The receiver's cache of all positions but the last; never used up.
        own: Its keys and values, ``(L, B, H, T - 1, D)``.
        fused: Likewise, fused.
    """

    readings: Sequence[AlignedRow]
    prompt: AlignedPrompt
    prefilled: Cache
    own: KV
    fused: KV

    @property
    def fused_positions(self) -> Tensor:
        """``(B, T - 1)`` bool: where something is fused."""
        reached = torch.stack([reads.index >= 0 for reads in self.prompt.sharers]).any(0)
        return (self.prompt.fuse_mask & reached)[:, :-1]


def read(pair: CacheToCache, questions: Sequence[Question]) -> Read:
    """Let all models read some prompts of two tokens or more, and fuse what they hold of them."""
    readings = [pair.align(one.prompt) for one in questions]
    prompt = stack(readings)
    streams = pair.read(prompt)
    own = read_cache(streams.receiver)
    return Read(
        readings,
        prompt,
        streams.receiver,
        own,
        pair.fuse_kv(prompt=prompt, receiver=own, sharers=list(map(read_cache, streams.sharers))),
    )


@torch.no_grad()
def first_run(model: PreTrainedModel, seen: Read, kv: KV, **outputs: Any) -> Any:
    """The receiver's run over the last prompt token, whose logits are those of the first answer token.

    Args:
        model: The receiver.
        seen: The batch.
        kv: What it sees of the other positions; with one prompt, as many variants of them as there are rows.
        outputs: What the run is asked for beside logits, e.g. ``output_attentions=True``.
    """
    rows = kv.key.shape[1] if len(seen.prompt.ids) == 1 else -1
    given = {
        "input_ids": seen.prompt.ids[:, -1:],
        "attention_mask": seen.prompt.mask,
        "position_ids": seen.prompt.positions[:, -1:],
    }
    given = {name: tensor.expand(rows, -1).to(model.device) for name, tensor in given.items()}
    prefilled = seen.prefilled
    if rows > 1:  # recurrent state is not in kv
        prefilled = copy.deepcopy(prefilled)
        prefilled.reorder_cache(torch.zeros(rows, dtype=torch.long, device=kv.key.device))
    return model(**given, **outputs, **{CACHE: read_only_cache(prefilled, kv)})


def mix(own: KV, fused: KV, chosen: Tensor) -> KV:
    """The fused keys and values where ``chosen``, a bool that broadcasts to ``(L, B, H, T, D)``, and the receiver's own elsewhere."""
    return KV(torch.where(chosen, fused.key, own.key), torch.where(chosen, fused.value, own.value))


def judge(
    pair: CacheToCache,
    readings: Sequence[AlignedRow],
    prompt: AlignedPrompt,
    prefilled: Cache,
    kv: KV,
    answers: Sequence[str],
) -> np.ndarray:
    """How well the right answers follow from a cache.

    Args:
        pair: The models, of which the receiver answers.
        readings: The prompts.
        prompt: The same as a batch; its positions are those to go on from.
        prefilled: What the cache was prefilled as.
        kv: ``(L, B, H, T - 1, D)``.
        answers: One per row.

    Returns:
        ``(2, B)`` float64: whether the receiver would say just that, greedily, and the log-probability of it in nats.
    """
    receiver = pair.receiver
    responses = [
        tokenize_response(one, answer, receiver.tokenizer, ends=True)
        for one, answer in zip(readings, answers, strict=True)
    ]
    tail = stack_responses(prompt, responses)
    likely, greedy = score(receiver.model, prompt, tail, read_only_cache(prefilled, kv))
    return np.stack([greedy.double().cpu().numpy(), likely.double().cpu().numpy()])


def answer_ids(pair: CacheToCache, seen: Read, questions: Sequence[Question]) -> Tensor:
    """``(B,)`` int64: the first token of each right answer; where none is known, what the receiver wants to say first, fused."""
    wanted = first_run(pair.receiver.model, seen, seen.fused).logits[:, -1].argmax(-1).cpu()
    for row, (reading, one) in enumerate(zip(seen.readings, questions, strict=True)):
        if one.answer:
            wanted[row] = int(tokenize_response(reading, one.answer, pair.receiver.tokenizer).ids[0])
    return wanted


def roles(reading: TokenizedPrompt) -> np.ndarray:
    """``(n,)`` int64: the place in :data:`ROLES` of each token of a prompt."""
    role = locate(reading).sections % 2
    role[-1] = 2
    return role


def padded_roles(readings: Sequence[AlignedRow]) -> Tensor:
    """``(B, T)`` int64: :func:`roles`, padded left with -1."""
    return pad_left([roles(one.receiver) for one in readings], -1)[0]


def told(reading: TokenizedPrompt, tokenizer: Any) -> list[str]:
    """What each token says, white space visible."""
    return [show(tokenizer.decode([token])) for token in reading.ids]


def show(text: str) -> str:
    """A token's text for a picture, white space visible."""
    return "".join(c if c.isprintable() else "·" for c in text.replace(" ", "·").replace("\n", "⏎"))


def spread(study: Study, count: int) -> list[Question]:
    """So many of a study's questions, evenly over all of its kinds."""
    places = sorted(range(len(study.questions)), key=lambda place: (study.questions[place].category or "", place))
    chosen = np.linspace(0, len(places) - 1, min(count, len(places))).astype(int)
    return [study.questions[places[place]] for place in chosen]


def batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """The questions, so many at a time, of like length."""
    ordered = sorted(questions, key=lambda one: len(str(one.prompt)))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def turns_keys(model: LanguageModel) -> bool:
    """Whether a rotary embedding turns a model's keys by their positions."""
    try:
        return bool(model.rope.layers)
    except PairError:
        return False


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """While open, the model computes attention so that its weights can be asked for."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
