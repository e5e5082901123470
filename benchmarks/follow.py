"""What a generated token costs where the response is fused too, against prompts of 64 to 4,096 tokens.

python -m benchmarks.follow [--json FILE]

Random models on the CPU, one thread. A token needs three passes instead of one, the receiver's twice and the sharer's, so
about three times the receiver's own time is its price; it must not grow with the prompt faster than the receiver's does.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from benchmarks.asking import greedy
from benchmarks.pairs import text_of
from benchmarks.rows import Row, report, spread_row
from benchmarks.timing import in_turns, ratio, timed
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt, stack
from kvfuse.testing import tiny_fuser, tiny_model, tiny_tokenizer

LENGTHS = (64, 256, 1024, 4096)
NEW, REPEATS = 16, 5
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "max_position_embeddings": 8192}


def pairs(own_tokenizer: bool) -> tuple[CacheToCache, CacheToCache]:
    """The same models with a fuser for prompts, and with one for responses too."""
    receiver = tiny_model("qwen3", **SIZES)
    sharer = tiny_model("llama", tiny_tokenizer(300) if own_tokenizer else None, seed=1, **SIZES)
    prompt_only, followed = (
        CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, hidden_dim=64, fuse_response=fuse)])
        for fuse in (False, True)
    )
    return prompt_only, followed


@torch.no_grad()
def seconds_per_token(pair: CacheToCache, prompt: AlignedPrompt, fusers: Sequence[nn.Module] | None = None) -> float:
    """What all tokens but the first take, each; ``fusers`` as in :meth:`CacheToCache.answer`."""
    first, all_of_them = (timed(pair.answer, prompt, fusers=fusers, **greedy(new)) for new in (1, 1 + NEW))
    return (all_of_them - first) / NEW


def follow_rows(length: int, own_tokenizer: bool) -> Iterator[Row]:
    """The receiver alone, over a fused prompt, and with its response fused."""
    prompt_only, followed = pairs(own_tokenizer)
    prompt = stack([prompt_only.align(text_of(prompt_only.receiver.tokenizer, length))])
    setting = f"{'two tokenizers' if own_tokenizer else 'one tokenizer'}, {length} tokens"
    runs = {
        "receiver": partial(seconds_per_token, prompt_only, prompt, []),
        "fused prompt": partial(seconds_per_token, prompt_only, prompt),
        "fused response": partial(seconds_per_token, followed, prompt),
    }
    in_turns(runs, 1)
    taken = in_turns(runs, REPEATS)
    for name, seconds in taken.items():
        yield spread_row(f"per token, {name}", setting, [1e3 * one for one in seconds], None, "ms")
    yield spread_row(
        "per token, fused response / receiver", setting, ratio(taken["fused response"], taken["receiver"]), None, "x"
    )


def main(file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None) -> None:
    """For prompts of several lengths, with one tokenizer and with two."""
    torch.set_num_threads(1)
    report(chain.from_iterable(follow_rows(length, own) for own in (False, True) for length in LENGTHS), file)


if __name__ == "__main__":
    typer.run(main)
