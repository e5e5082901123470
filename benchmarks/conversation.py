"""Time to the first token of each turn of a conversation, with and without a prefix store.

python -m benchmarks.conversation [--shapes mid|true] [--turns 5] [--repeats 3] [--json FILE]

Random models, float32 on the CPU, one thread. The first prompt has 512 tokens, each turn adds 256: an answer and the
next question. Both ways take turns in one process, each conversation with its own store; times are medians. The bar is
the share of the prompt that is new, plus 5% for copies of caches, for attention to the rest, and for the token.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
import typer

from benchmarks.asking import greedy
from benchmarks.pairs import Shapes, random_pair
from benchmarks.rows import JsonFile, Row, report, row, spread_row
from benchmarks.timing import ratio, timed
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import from_ids
from kvfuse.stages.prefix_store import PrefixStore

FIRST_TOKENS, TOKENS_PER_TURN = 512, 256


@torch.no_grad()
def seconds_to_first_token(pair: CacheToCache, ids: torch.Tensor) -> float:
    """Returns the time to read a prompt ``(1, T)`` with both models, fuse and generate one token."""
    return timed(pair.answer, from_ids(ids), **greedy(1))


def conversation_rows(shapes: str, turns: int, repeats: int) -> Iterator[Row]:
    """Rows of each turn; the last turn is also asked again."""
    pair = random_pair(shapes)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 300, (1, FIRST_TOKENS + TOKENS_PER_TURN * (turns - 1)), generator=generator)
    # every turn, then the last one again
    lengths = [*range(FIRST_TOKENS, ids.shape[1] + 1, TOKENS_PER_TURN), ids.shape[1]]
    stores = [PrefixStore() for _ in range(repeats)]
    seconds_to_first_token(pair, ids)  # warm-up
    for turn, length in enumerate(lengths):
        without, kept = [], []
        # each round is one conversation: its store fills up turn by turn
        for store in stores:
            pair.store = None
            without.append(seconds_to_first_token(pair, ids[:, :length]))
            pair.store = store
            kept.append(seconds_to_first_token(pair, ids[:, :length]))
        setting = f"{shapes}, {'last turn again' if turn == turns else f'turn {turn + 1}'}, {length} tokens"
        new_share = [1.0, *(TOKENS_PER_TURN / longer for longer in lengths[1:turns]), 0.0][turn]
        yield spread_row("first token without a store", setting, without, None, "s")
        yield spread_row("first token with a store", setting, kept, None, "s")
        yield spread_row("with / without", setting, ratio(kept, without), new_share + 0.05, "x")
    yield row("held by the store", f"{shapes}, {ids.shape[1]} tokens", stores[0].stats.nbytes / 2**20, None, "MiB")


def main(
    shapes: Shapes = "mid",
    turns: Annotated[int, typer.Option(min=2)] = 5,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    json_file: JsonFile = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    report(conversation_rows(shapes, turns, repeats), json_file)


if __name__ == "__main__":
    typer.run(main)
