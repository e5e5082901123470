"""An encoded example, and there and back from the plain integer columns that are kept on disk."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvfuse.prompts.alignment import AlignedRow
from kvfuse.prompts.chat import RenderedPrompt
from kvfuse.prompts.response import Response
from kvfuse.prompts.tokenized import TokenizedPrompt
from kvfuse.training.data.sources import import_datasets

PROMPT_COLUMNS, SHARER_COLUMNS = (
    ("ids", "positions", "fusable", "response"),
    ("ids", "positions", "index", "response", "seen"),
)
NOTHING = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class EncodedExample:
    """An example as the models read it.

    Attributes:
        prompt: The aligned prompt.
        response_ids: ``(R,)`` int64, the receiver's.
        sharers: What the sharers read of it (:class:`kvfuse.prompts.response.Response`).
    """

    prompt: AlignedRow
    response_ids: np.ndarray
    sharers: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    @property
    def response(self) -> Response:
        """The response alone."""
        return Response(self.response_ids, self.sharers)


def to_columns(example: EncodedExample) -> dict[str, Any]:
    """An example as plain integers: ``(n,)`` int32 columns of the receiver, and of each sharer a list of such."""
    prompt = example.prompt
    responses = example.sharers or ((NOTHING, NOTHING),) * len(prompt.sharers)
    mine = (prompt.receiver.ids, prompt.receiver.positions, prompt.fusable, example.response_ids)
    theirs = [
        (reading.ids, reading.positions, index, *response)
        for (reading, index), response in zip(prompt.sharers, responses, strict=True)
    ]
    return {
        **dict(zip(PROMPT_COLUMNS, map(_narrow, mine), strict=True)),
        **{
            f"sharer_{name}": list(map(_narrow, column))
            for name, column in zip(SHARER_COLUMNS, zip(*theirs, strict=True), strict=True)
        },
        "pad_ids": [prompt.receiver.pad_id, *(reading.pad_id for reading, _ in prompt.sharers)],
        "length": len(prompt.receiver.ids) + len(example.response_ids),
    }


def from_columns(row: dict[str, Any]) -> EncodedExample:
    """:func:`to_columns` back, without the prompt's text, which no batch has need of."""
    ids, positions, fusable, response = (np.array(row[name], dtype=np.int64) for name in PROMPT_COLUMNS)
    theirs = zip(*(row[f"sharer_{name}"] for name in SHARER_COLUMNS), strict=True)
    sharers = [tuple(np.array(column, dtype=np.int64) for column in one) for one in theirs]
    mine, *their_pads = row["pad_ids"]
    readings = tuple((_reading(one[0], one[1], pad), one[2]) for one, pad in zip(sharers, their_pads, strict=True))
    responses = tuple((one[3], one[4]) for one in sharers if len(one[4]))
    return EncodedExample(
        AlignedRow(_reading(ids, positions, mine), fusable.astype(bool), readings), response, responses
    )


def empty_row() -> dict[str, Any]:
    """The columns of a row without an example."""
    columns = {
        **dict.fromkeys(PROMPT_COLUMNS, NOTHING),
        **{f"sharer_{name}": [] for name in SHARER_COLUMNS},
        "pad_ids": [],
    }
    return {"reason": "", **columns, "length": 0, "characters": 0, "shortened": 0}


def features() -> Any:
    """What ``datasets`` keeps of a row: where it comes from, what is wrong with it, and the columns of its example."""
    datasets = import_datasets()
    text, number = datasets.Value("string"), datasets.Value("int32")
    numbers = datasets.List(number)
    return datasets.Features(
        {
            "source": text,
            "line": datasets.Value("int64"),
            "reason": text,
            "pad_ids": numbers,
            **dict.fromkeys(PROMPT_COLUMNS, numbers),
            **dict.fromkeys((f"sharer_{name}" for name in SHARER_COLUMNS), datasets.List(numbers)),
            **dict.fromkeys(("length", "characters", "shortened"), number),
        }
    )


def _narrow(column: np.ndarray) -> np.ndarray:
    """One type for all columns: ``datasets`` writes arrays of one type alone as they are."""
    return column.astype(np.int32)


def _reading(ids: np.ndarray, positions: np.ndarray, pad_id: int) -> TokenizedPrompt:
    return TokenizedPrompt(
        ids, np.zeros((len(ids), 2), dtype=np.int64), RenderedPrompt("", (), (), templated=False), pad_id, positions
    )
