"""What a generated token costs where the response is fused too, against prompts of 64 to 4,096 tokens.

python -m benchmarks.follow [--json FILE]

Random models on the CPU, one thread. A token needs three passes instead of one, the receiver's twice and the sharer's, so
about three times the receiver's own time is its price; it must not grow with the prompt faster than the receiver's does.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks.pairs import text_of
from kvfuse.model import CacheToCache
from kvfuse.testing import tiny_fuser, tiny_model, tiny_tokenizer
from kvfuse.token_alignment import stack

LENGTHS = (64, 256, 1024, 4096)
NEW, REPEATS = 16, 5
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "max_position_embeddings": 8192}
ROW = "{tokenizers:8} {prompt_tokens:6} {receiver_ms:12.2f} {fused_prompt_ms:12.2f} {fused_response_ms:14.2f} {ratio:7.2f}"


def pairs(own_tokenizer: bool) -> tuple[CacheToCache, CacheToCache]:
    """The same models with a fuser for prompts, and with one for responses too."""
    receiver = tiny_model("qwen3", **SIZES)
    sharer = tiny_model("llama", tiny_tokenizer(300) if own_tokenizer else None, seed=1, **SIZES)
    prompt_only, followed = (
        CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, hidden_dim=64, fuse_response=fuse)]) for fuse in (False, True)
    )
    return prompt_only, followed


@torch.no_grad()
def milliseconds_per_token(pair: CacheToCache, prompt: str, fusers: Sequence[nn.Module] | None = None) -> float:
    """Median over some runs of what all tokens but the first take; ``fusers`` as in :meth:`CacheToCache.answer`."""
    aligned = stack([pair.align(prompt)])
    runs = []
    for _ in range(REPEATS):
        seconds = []
        for new in (1, 1 + NEW):
            start = time.perf_counter()
            pair.answer(aligned, fusers, do_sample=False, min_new_tokens=new, max_new_tokens=new)
            seconds.append(time.perf_counter() - start)
        runs.append((seconds[1] - seconds[0]) / NEW * 1000)
    return statistics.median(runs)


def measure(length: int, own_tokenizer: bool) -> dict[str, Any]:
    """One row."""
    prompt_only, followed = pairs(own_tokenizer)
    prompt = text_of(prompt_only.receiver.tokenizer, length)
    alone = milliseconds_per_token(prompt_only, prompt, fusers=[])
    fused, response = (milliseconds_per_token(pair, prompt) for pair in (prompt_only, followed))
    return {
        "tokenizers": "two" if own_tokenizer else "one",
        "prompt_tokens": length,
        "receiver_ms": alone,
        "fused_prompt_ms": fused,
        "fused_response_ms": response,
        "ratio": response / alone,
    }


def main(file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None) -> None:
    """Print a row per prompt length, for one tokenizer and for two."""
    torch.set_num_threads(1)
    typer.echo("tokenizers prompt  receiver ms  fused prompt  fused response  ratio")
    rows = []
    for own_tokenizer in (False, True):
        for length in LENGTHS:
            rows.append(measure(length, own_tokenizer))
            typer.echo(ROW.format(**rows[-1]))
    if file:
        file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
