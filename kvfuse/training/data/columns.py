"""Encoded examples, and their form on disk: plain integer columns."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvfuse.prompts.alignment import AlignedRow
from kvfuse.prompts.chat import RenderedPrompt
from kvfuse.prompts.response import Response
from kvfuse.prompts.tokenized import TokenizedPrompt
from kvfuse.training.data.sources import import_datasets

RECEIVER_COLUMNS = ("ids", "positions", "fusable", "response")
SHARER_COLUMNS = ("sharer_ids", "sharer_positions", "sharer_index", "sharer_response", "sharer_seen")
EMPTY = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class EncodedExample:
    """An example as token ids: the aligned prompt, and the response as each model reads it."""

    prompt: AlignedRow
    response: Response

    @property
    def sharer_responses(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """``Response.sharers``, with empty arrays where the response is not fused and no sharer reads it."""
        return self.response.sharers or ((EMPTY, EMPTY),) * len(self.prompt.sharers)


def to_columns(example: EncodedExample) -> dict[str, Any]:
    """Flatten an example: ``(n,)`` int32 columns of the receiver, and lists of such with one entry per sharer."""
    prompt, response = example.prompt, example.response
    receiver = (prompt.receiver.ids, prompt.receiver.positions, prompt.fusable, response.ids)
    # One tuple per sharer here, one list per column below
    sharers = [
        (tokens.ids, tokens.positions, index, *response_part)
        for (tokens, index), response_part in zip(prompt.sharers, example.sharer_responses, strict=True)
    ]
    pad_ids = [prompt.receiver.pad_id, *(tokens.pad_id for tokens, _ in prompt.sharers)]
    columns: dict[str, Any] = {"pad_ids": pad_ids, "length": len(prompt.receiver.ids) + len(response.ids)}
    # One dtype for all: datasets writes arrays without conversion only where they share one
    for name, column in zip(RECEIVER_COLUMNS, receiver, strict=True):
        columns[name] = column.astype(np.int32)
    for name, parts in zip(SHARER_COLUMNS, zip(*sharers, strict=True), strict=True):
        columns[name] = [part.astype(np.int32) for part in parts]
    return columns


def from_columns(row: dict[str, Any]) -> EncodedExample:
    """Undo :func:`to_columns`, except for the prompt's text, which batches do not need."""
    ids, positions, fusable, response = (np.array(row[name], dtype=np.int64) for name in RECEIVER_COLUMNS)
    receiver_pad, *sharer_pads = row["pad_ids"]
    # Back from one list per column to one tuple per sharer
    prompts, responses = [], []
    for columns, pad_id in zip(zip(*(row[name] for name in SHARER_COLUMNS), strict=True), sharer_pads, strict=True):
        sharer_ids, sharer_positions, index, read, seen = (np.array(column, dtype=np.int64) for column in columns)
        prompts.append((_tokenized(sharer_ids, sharer_positions, pad_id), index))
        responses.append((read, seen))
    fused = tuple(pair for pair in responses if len(pair[1]))  # "seen" has an entry also for an empty response
    prompt = AlignedRow(_tokenized(ids, positions, receiver_pad), fusable.astype(bool), tuple(prompts))
    return EncodedExample(prompt, Response(response, fused))


def empty_row() -> dict[str, Any]:
    """The columns of a row that gave no example."""
    lists: dict[str, list[Any]] = {name: [] for name in (*SHARER_COLUMNS, "pad_ids")}
    numbers = dict.fromkeys(("length", "characters", "shortened"), 0)
    return {"reason": "", **dict.fromkeys(RECEIVER_COLUMNS, EMPTY), **lists, **numbers}


def features() -> Any:
    """The columns as types of ``datasets``: where a row comes from, what is wrong with it, and its example."""
    datasets = import_datasets()
    text, number = datasets.Value("string"), datasets.Value("int32")
    return datasets.Features(
        {
            "source": text,
            "line": datasets.Value("int64"),
            "reason": text,
            **dict.fromkeys((*RECEIVER_COLUMNS, "pad_ids"), datasets.List(number)),
            **dict.fromkeys(SHARER_COLUMNS, datasets.List(datasets.List(number))),
            **dict.fromkeys(("length", "characters", "shortened"), number),
        }
    )


def _tokenized(ids: np.ndarray, positions: np.ndarray, pad_id: int) -> TokenizedPrompt:
    no_text = RenderedPrompt("", (), (), templated=False)
    return TokenizedPrompt(ids, np.zeros((len(ids), 2), dtype=np.int64), no_text, pad_id, positions)
