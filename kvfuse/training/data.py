"""Files -> examples (prompt, response) -> aligned, labelled, padded batches."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvfuse.chat import Prompt
from kvfuse.errors import PromptError, RecipeError
from kvfuse.model import CacheToCache
from kvfuse.reading import Reading
from kvfuse.reencode import reencoding
from kvfuse.token_alignment import AlignedPrompt, AlignedReading, SharerPrompt, pad_left, stack
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
        sharers: Where the response is fused too, per sharer: what it reads of it ``(R_s,)``, and for the last prompt token
            and each response token how many of these it may see ``(1 + R,)``: those that say no more than has been said.
    """

    prompt: AlignedReading
    response_ids: np.ndarray
    sharers: tuple[tuple[np.ndarray, np.ndarray], ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """A padded batch: prompts padded left, what follows padded right, so that one column parts the two everywhere.

    Attributes:
        prompt: The prompts, their last token included.
        tail: ``(B, 1 + R)``: the last prompt token, then the response. Where the response is fused too, each sharer's last
            prompt token and its reading of the response ``(B, 1 + R_s)``.
        labels: ``(B, 1 + R)`` int64, :data:`IGNORED` on the prompt's token and on padding.
    """

    prompt: AlignedPrompt
    tail: AlignedPrompt
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
    receiver = pair.receiver
    ids, ends = _read_response(prompt.receiver, example.response, receiver.tokenizer)
    if example.ends:
        ids, ends = np.append(ids, receiver.tokenizer.eos_token_id), np.append(ends, len(example.response))
    length = len(prompt.receiver.ids) + len(ids)
    if receiver.context is not None and length > receiver.context:
        room = f"{receiver.context} tokens of {receiver.name}"
        raise PromptError(f"expected prompt and response to fit {room}, got {length}; shorten them")
    if not pair.fuse_response:
        return EncodedExample(prompt, ids)
    sharers = []
    for sharer, fuser, (reading, _) in zip(pair.sharers, pair.fusers, prompt.sharers, strict=True):
        how = fuser.config.token_alignment
        if how == "span":
            their_ids, their_ends = _read_response(reading, example.response, sharer.tokenizer)
            sharers.append((their_ids, np.searchsorted(their_ends, np.append(0, ends), side="right")))
        else:  # token by token
            their_ids = ids if how == "identity" else reencoding(receiver.tokenizer, sharer.tokenizer, how)[ids]
            sharers.append((their_ids, np.arange(1 + len(ids))))
    return EncodedExample(prompt, ids, tuple(sharers))


def collate(examples: Sequence[EncodedExample]) -> TrainingBatch:
    """Pad encoded examples into a batch."""
    ids, mask = _pad_right([np.concatenate([example.prompt.receiver.ids[-1:], example.response_ids]) for example in examples], 0)
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, 0] = IGNORED
    prompt = stack([example.prompt for example in examples])
    sharers = tuple(_collate_sharer(examples, place, prompt.sharers[place]) for place in range(len(examples[0].sharers)))
    tail = AlignedPrompt(ids=ids, mask=mask, positions=_go_on(prompt, ids), sharers=sharers, fuse_mask=mask.bool())
    return TrainingBatch(prompt=prompt, tail=tail, labels=labels)


def _go_on(prompt: AlignedPrompt | SharerPrompt, ids: Tensor) -> Tensor:
    """Positions ``(B, k)`` from the last prompt token on."""
    return prompt.positions[:, -1:] + torch.arange(ids.shape[1])


def _collate_sharer(examples: Sequence[EncodedExample], place: int, prompt: SharerPrompt) -> SharerPrompt:
    readings = [example.prompt.sharers[place][0] for example in examples]
    responses, indices = zip(*(example.sharers[place] for example in examples), strict=True)
    ids, mask = _pad_right([np.append(reading.ids[-1:], response) for reading, response in zip(readings, responses, strict=True)], 0)
    return SharerPrompt(ids=ids, mask=mask, positions=_go_on(prompt, ids), index=_pad_right(indices, -1)[0])


def _pad_right(rows: Sequence[np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    ids, mask = pad_left([row[::-1] for row in rows], fill)
    return ids.flip(1), mask.flip(1)


def _read_response(prompt: Reading, response: str, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize a response as it follows its prompt; alone, where the two would grow together.

    Returns:
        Ids ``(n,)`` int64, and how many characters of the response have been said after each ``(n,)`` int64.
    """
    text, length, origin = prompt.prompt.text, len(prompt.ids), len(prompt.prompt.text)
    encoded = tokenizer(text + response, add_special_tokens=not prompt.prompt.templated, return_offsets_mapping=True)
    if encoded.input_ids[:length] != prompt.ids.tolist():
        encoded = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)
        length, origin = 0, 0
    starts, ends = np.array(encoded.offset_mapping[length:], dtype=np.int64).reshape(-1, 2).T - origin
    ends[:-1] = np.minimum(ends[:-1], starts[1:])  # all pieces of a character but its last have not said it yet
    return np.array(encoded.input_ids[length:], dtype=np.int64), ends


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
