"""Time and memory of a training step next to its necessary parts.

python -m benchmarks.training [--shapes mid|true] [--batch 1] [--repeats 5] [--json FILE]

Random models, float32 on the CPU, one thread; 512 tokens per example, 30% of them response. A step and its parts take
turns in one process; times are medians, memory is the most alive at one time beyond weights, gradients and the
optimizer's state.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from datasets import Dataset
from torch import Tensor
from transformers import DynamicCache

from benchmarks.memory import peak_bytes
from benchmarks.pairs import Shapes, random_pair
from benchmarks.rows import JsonFile, Row, report, row, spread_row
from benchmarks.timing import TrainerClock, in_turns, ratio, timed, total
from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import CACHE, cache_of, read_cache
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedRow
from kvfuse.prompts.chat import RenderedPrompt
from kvfuse.prompts.response import Response
from kvfuse.prompts.tokenized import TokenizedPrompt
from kvfuse.training.data.columns import EncodedExample, to_columns
from kvfuse.training.loop.batches import TrainingBatch, collate
from kvfuse.training.loop.loss import response_loss
from kvfuse.training.loop.trainer import FuserTrainer
from kvfuse.training.recipe import TrainSection

TOKENS, RESPONSE_TOKENS = 512, 154
EPOCH_EXAMPLES = 6


def random_example(seed: int = 0, tokens: int = TOKENS, response: int = RESPONSE_TOKENS) -> EncodedExample:
    """Returns an example of random ids that both models read alike."""
    ids = np.random.default_rng(seed).integers(5, 300, tokens)
    length = tokens - response
    text = RenderedPrompt("", (), (), templated=False)
    tokenized = TokenizedPrompt(ids[:length], np.zeros((length, 2), dtype=np.int64), text, 0, np.arange(length))
    # the last prompt token is never fused
    fusable = np.arange(length) < length - 1
    return EncodedExample(AlignedRow(tokenized, fusable, ((tokenized, np.arange(length)),)), Response(ids[length:]))


class Step:
    """A training step without Trainer, as a whole and part by part.

    Args:
        pair: The models; the first fuser is trained.
        batch: The examples.
    """

    def __init__(self, pair: CacheToCache, batch: TrainingBatch) -> None:
        self.pair, self.batch, self.fuser = pair, batch, pair.fusers[0].train()
        self.optimizer = torch.optim.AdamW(self.fuser.parameters(), lr=1e-6, fused=True)
        # the fuser's inputs, for timing it by itself
        with torch.no_grad():
            caches = pair.read(batch.prompt)
        self.receiver, sharer = read_cache(caches.receiver), read_cache(caches.sharers[0])
        fused = self.receiver.key.shape[3]  # all positions but the last
        self.sharer = KV(sharer.key[..., :fused, :], sharer.value[..., :fused, :])
        self.gradient = [torch.randn_like(part) for part in (self.receiver.key, self.receiver.value)]
        self.whole()  # creates the optimizer's state

    def whole(self, recompute: bool = False) -> None:
        """Run all of it, as Trainer does."""
        self.learn(recompute)
        self.optimize()

    def learn(self, recompute: bool = False) -> Tensor:
        """Compute loss and gradients, added to the present ones; returns the loss."""
        self.fuser.recompute = recompute
        loss = response_loss(self.pair, self.batch, recompute=recompute)
        loss.backward()
        return loss.detach()

    def parts(self) -> dict[str, Callable[[], None]]:
        """Returns the necessary parts of any step by name."""
        pair, prompt = self.pair, self.batch.prompt
        return {
            "receiver prefill": partial(self._prefill, pair.receiver.model, prompt.ids[:, :-1]),
            "sharer prefill": partial(self._prefill, pair.sharers[0].model, prompt.sharers[0].ids),
            "fuser": self._fuse,
            "response": self._respond,
            "optimizer": self.optimize,
        }

    def optimize(self) -> None:
        """Clip, step, and set gradients to zero."""
        torch.nn.utils.clip_grad_norm_(self.fuser.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    @torch.no_grad()
    def _prefill(self, model: Any, ids: Tensor) -> None:
        model.base_model(ids, use_cache=True, **{CACHE: DynamicCache(config=model.config)})

    def _fuse(self) -> None:
        self.fuser.recompute = False
        residual = self.fuser(receiver=self.receiver, sharer=self.sharer)
        torch.autograd.backward([residual.key, residual.value], self.gradient)

    def _respond(self) -> None:
        # gradients end at the fused cache
        prefix = KV(*(part.detach().requires_grad_() for part in (self.receiver.key, self.receiver.value)))
        inputs = {"labels": self.batch.labels, "use_cache": False, CACHE: cache_of(prefix)}
        self.pair.receiver.model(self.batch.tail.ids, **inputs).loss.backward()


def random_step(pair: CacheToCache, batch: int) -> Step:
    """Returns a step of random examples."""
    return Step(pair, collate([random_example(seed) for seed in range(batch)]))


def step_rows(step: Step, setting: str, repeats: int) -> Iterator[Row]:
    """A step against its parts, and with recomputation."""
    parts = step.parts()
    runs: dict[str, Callable[[], Any]] = {
        "step": step.whole,
        "recomputed": partial(step.whole, recompute=True),
        **parts,
    }
    taken = in_turns({name: partial(timed, run) for name, run in runs.items()}, repeats)
    # times, each round against its own parts
    bare = total(*(taken[name] for name in parts))
    yield spread_row("step / bare parts", setting, ratio(taken["step"], bare), 1.15, "x")
    yield spread_row("step with recomputation / bare parts", setting, ratio(taken["recomputed"], bare), None, "x")
    for name, seconds in taken.items():
        yield spread_row(name, setting, seconds, None, "s")
    # memory
    plain, recomputed = (peak_bytes(partial(step.learn, recompute)) for recompute in (False, True))
    yield row("memory", setting, plain / 2**20, None, "MiB")
    yield row("memory with recomputation / without", setting, recomputed / plain, 0.45, "x")


def equality_rows(step: Step, setting: str) -> Iterator[Row]:
    """The effect of recomputation on loss and gradients, without dropout, whose masks are drawn piece by piece."""
    for module in step.fuser.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients, losses = [], []
    for recompute in (False, True):
        step.optimizer.zero_grad(set_to_none=False)
        torch.manual_seed(0)
        losses.append(float(step.learn(recompute)))
        gradients.append([weight.grad.clone() for weight in step.fuser.parameters() if weight.grad is not None])
    # relative to each weight's largest gradient
    differences = (
        float((recomputed - plain).abs().max() / plain.abs().max().clamp(min=1e-30))
        for plain, recomputed in zip(*gradients, strict=True)
    )
    yield row("loss, recomputed - not", setting, losses[1] - losses[0], None, "nats")
    yield row("largest difference of a gradient", setting, max(differences), 1e-3, "x")


def epoch_rows(shapes: str, batch: int, kind: str) -> Iterator[Row]:
    """An epoch from caches kept on disk against the first epoch, which reads the prompts and keeps them."""
    pair = random_pair(shapes, kind)
    rows = Dataset.from_list([to_columns(random_example(seed)) for seed in range(EPOCH_EXAMPLES)])
    for keep in ("sharer", "both"):
        clock = TrainerClock()
        with tempfile.TemporaryDirectory() as folder:
            train = TrainSection(epochs=4, batch_size=batch, learning_rate=1e-6, keep_caches=keep)
            trainer = FuserTrainer(pair, train, rows, Path(folder, "checkpoints"), quiet=True)
            trainer.add_callback(clock)
            start = time.perf_counter()
            trainer.resume()
        first, *later, _ = np.diff([start, *clock.epochs])  # the last one writes the run's checkpoint too
        setting = f"{shapes}, batch {batch}, {kind}, caches of {keep}"
        yield row("epoch / first epoch", setting, statistics.median(later) / first, 0.75, "x")


def main(
    shapes: Shapes = "mid",
    batch: Annotated[int, typer.Option(help="Examples per step.")] = 1,
    repeats: Annotated[int, typer.Option(help="Number of rounds.")] = 5,
    epochs: Annotated[bool, typer.Option(help="Measure epochs with kept caches too.")] = True,
    json_file: JsonFile = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    report(_rows(shapes, batch, repeats, epochs), json_file)


def _rows(shapes: str, batch: int, repeats: int, epochs: bool) -> Iterator[Row]:
    step, setting = random_step(random_pair(shapes), batch), f"{shapes}, batch {batch}"
    yield from step_rows(step, setting, repeats)
    yield from equality_rows(step, setting)
    del step  # its pair and optimizer take half of the memory that the next ones may need
    for kind in ("c2c", "low-rank") if epochs else ():
        yield from epoch_rows(shapes, batch, kind)


if __name__ == "__main__":
    typer.run(main)
