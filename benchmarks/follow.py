"""Time of a generated token where the response is fused too, for prompts of 64 to 4,096 tokens.

python -m benchmarks.follow [--json FILE]

Random models on the CPU, one thread. A token needs three passes instead of one, two of the receiver and one of the
sharer, so it costs about three times the receiver's own; that ratio must not grow with the prompt.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

import torch
import typer
from torch import nn

from benchmarks.asking import greedy
from benchmarks.pairs import text_of
from benchmarks.rows import JsonFile, Row, report, spread_row
from benchmarks.timing import in_turns, milliseconds, ratio, timed
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt, stack
from kvfuse.testing import tiny_fuser, tiny_model, tiny_tokenizer

LENGTHS = (64, 256, 1024, 4096)
NEW_TOKENS, REPEATS = 16, 5
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "max_position_embeddings": 8192}


def pairs(own_tokenizer: bool) -> list[CacheToCache]:
    """Returns the same models with a fuser for prompts, and with one for responses too."""
    receiver = tiny_model("qwen3", **SIZES)
    sharer = tiny_model("llama", tiny_tokenizer(300) if own_tokenizer else None, seed=1, **SIZES)
    fusers = [tiny_fuser(receiver, sharer, hidden_dim=64, fuse_response=responses) for responses in (False, True)]
    return [CacheToCache(receiver, [sharer], [fuser]) for fuser in fusers]


@torch.no_grad()
def seconds_per_token(pair: CacheToCache, prompt: AlignedPrompt, fusers: Sequence[nn.Module] | None = None) -> float:
    """Returns the mean time of all tokens but the first; ``fusers`` as in :meth:`CacheToCache.answer`."""
    # the first token includes the prefill
    first, all_of_them = (timed(pair.answer, prompt, fusers=fusers, **greedy(new)) for new in (1, 1 + NEW_TOKENS))
    return (all_of_them - first) / NEW_TOKENS


def follow_rows(length: int, own_tokenizer: bool) -> Iterator[Row]:
    """The receiver alone, over a fused prompt, and with its response fused."""
    # the same prompt for all: alignment does not depend on the fuser
    prompt_only, with_response = pairs(own_tokenizer)
    prompt = stack([prompt_only.align(text_of(prompt_only.receiver.tokenizer, length))])
    setting = f"{'two tokenizers' if own_tokenizer else 'one tokenizer'}, {length} tokens"
    runs = {
        "receiver": partial(seconds_per_token, prompt_only, prompt, []),
        "fused prompt": partial(seconds_per_token, prompt_only, prompt),
        "fused response": partial(seconds_per_token, with_response, prompt),
    }
    in_turns(runs, 1)  # warm-up
    taken = in_turns(runs, REPEATS)
    for name, seconds in taken.items():
        yield spread_row(f"per token, {name}", setting, milliseconds(seconds), None, "ms")
    over_receiver = ratio(taken["fused response"], taken["receiver"])
    yield spread_row("per token, fused response / receiver", setting, over_receiver, None, "x")


def main(json_file: JsonFile = None) -> None:
    """Measure prompts of several lengths, with one tokenizer and with two, and print."""
    torch.set_num_threads(1)
    rows = (follow_rows(length, own_tokenizer) for own_tokenizer in (False, True) for length in LENGTHS)
    report(chain.from_iterable(rows), json_file)


if __name__ == "__main__":
    typer.run(main)
