"""Files -> examples (prompt, response) -> aligned, labelled, padded batches."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfuse.chat import Prompt
from kvfuse.errors import PromptError, RecipeError
from kvfuse.model import CacheToCache
from kvfuse.token_alignment import AlignedPrompt, AlignedReading, stack
from kvfuse.training.recipe import DataSection

IGNORED = -100  # the label that transformers' losses skip


@dataclass(frozen=True)
class Example:
    """A prompt and the response to learn."""

    prompt: Prompt
    response: str
    ends: bool = True
    """Whether the answer is over after the response, so that the end-of-sequence token is learnt too."""


@dataclass(frozen=True)
class EncodedExample:
    """An example as the models read it.

    Attributes:
        prompt: The aligned prompt.
        response_ids: ``(R,)`` int64, the receiver's.
    """

    prompt: AlignedReading
    response_ids: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """A padded batch: prompts padded left, what follows padded right, so that one column parts the two everywhere.

    Attributes:
        prompt: The prompts, their last token included.
        ids: ``(B, 1 + R)`` int64: the last prompt token, then the response.
        mask: ``(B, 1 + R)`` int64.
        labels: ``(B, 1 + R)`` int64, :data:`IGNORED` on the prompt's token and on padding.
    """

    prompt: AlignedPrompt
    ids: Tensor
    mask: Tensor
    labels: Tensor


def load_examples(data: DataSection) -> list[Example]:
    """Read all examples of a recipe's data file.

    Raises:
        RecipeError: The file is missing, not UTF-8, or a row is not what ``data.format`` says; names the line.
    """
    try:
        text = data.path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"expected a readable file at data.path {data.path}, got: {error}; check it") from error
    examples = list(_documents(text, data) if data.format == "text" else _chats(text, data.path))[: data.limit]
    if len(examples) < 2:
        raise RecipeError(f"expected at least 2 examples in {data.path}, got {len(examples)}; check data.format and data.separator")
    return examples


def split(examples: Sequence[Example], validation_share: float) -> tuple[list[Example], list[Example]]:
    """Hold out the last share of the examples, at least one of them."""
    held_out = min(max(1, round(len(examples) * validation_share)), len(examples) - 1)
    return list(examples[:-held_out]), list(examples[-held_out:])


def encode(example: Example, pair: CacheToCache) -> EncodedExample:
    """Align the prompt and tokenize the response as it would follow it.

    Raises:
        PromptError: The prompt, or prompt and response together, are longer than a model's context.
    """
    prompt = pair.align(example.prompt)
    tokenizer, rendered = pair.receiver.tokenizer, prompt.receiver.prompt
    joint = tokenizer(rendered.text + example.response, add_special_tokens=not rendered.templated).input_ids
    length = len(prompt.receiver.ids)
    ids = (
        joint[length:]
        if joint[:length] == prompt.receiver.ids.tolist()
        else tokenizer(example.response, add_special_tokens=False).input_ids
    )
    if example.ends:
        ids = [*ids, tokenizer.eos_token_id]
    if pair.receiver.context is not None and length + len(ids) > pair.receiver.context:
        room = f"{pair.receiver.context} tokens of {pair.receiver.name}"
        raise PromptError(f"expected prompt and response to fit {room}, got {length + len(ids)}; shorten them")
    return EncodedExample(prompt, np.array(ids, dtype=np.int64))


def collate(examples: Sequence[EncodedExample]) -> TrainingBatch:
    """Pad encoded examples into a batch."""
    tails = [np.concatenate([example.prompt.receiver.ids[-1:], example.response_ids]) for example in examples]
    length = max(len(tail) for tail in tails)
    ids, mask, labels = np.zeros((3, len(tails), length), dtype=np.int64)
    labels[:] = IGNORED
    for row, tail in enumerate(tails):
        ids[row, : len(tail)], mask[row, : len(tail)], labels[row, 1 : len(tail)] = tail, 1, tail[1:]
    prompt = stack([example.prompt for example in examples])
    return TrainingBatch(prompt=prompt, ids=torch.from_numpy(ids), mask=torch.from_numpy(mask), labels=torch.from_numpy(labels))


def _documents(text: str, data: DataSection) -> Iterator[Example]:
    """Cut each document, always before white space, into pieces of a prompt and the response that follows it."""
    for document in map(str.strip, text.split(data.separator)):
        start = 0
        while start < len(document):
            cut = _next_space(document, start + data.prompt_characters)
            end = _next_space(document, cut + data.response_characters)
            if cut < end:
                yield Example(document[start:cut].lstrip(), document[cut:end], ends=end == len(document))
            start = end


def _next_space(text: str, start: int) -> int:
    return next((place for place in range(start, len(text)) if text[place].isspace()), len(text))


def _chats(text: str, path: Path) -> Iterator[Example]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield _chat(json.loads(line))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                wanted = "a chat that ends with the assistant, or a prompt and a response"
                raise RecipeError(f"expected {path} line {number} to be {wanted}, got: {error}; correct it") from error


def _chat(row: dict[str, Any]) -> Example:
    if "messages" not in row:
        return Example([{"role": "user", "content": row["prompt"]}], _text(row["response"]))
    *prompt, last = row["messages"]
    if last["role"] != "assistant" or not prompt:
        raise ValueError(f"a chat of {len(prompt) + 1} messages whose last is the {last['role']}'s")
    return Example(prompt, _text(last["content"]))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"a response without text: {value!r}")
    return value
