"""What a training step costs, beside the bare parts that it cannot do without.

python -m benchmarks.training [--shapes mid|true] [--batch 1] [--repeats 5] [--json FILE]

Random models, float32 on the CPU, one thread; 512 tokens an example, 30% of them response. A step and its parts take turns in one
process; times are medians, memory is what is alive at one time beyond weights, gradients and the optimizer's state.
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
from transformers import DynamicCache, TrainerCallback

from benchmarks.memory import peak_bytes
from benchmarks.pairs import random_pair
from benchmarks.rows import Row, report, row, spread_row
from benchmarks.timing import in_turns, ratio, timed, total
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

TOKENS, RESPONSE = 512, 154


def random_example(seed: int = 0, tokens: int = TOKENS, response: int = RESPONSE) -> EncodedExample:
    """An example of random ids that both models read alike."""
    ids = np.random.default_rng(seed).integers(5, 300, tokens)
    length = tokens - response
    text = RenderedPrompt("", (), (), templated=False)
    reading = TokenizedPrompt(ids[:length], np.zeros((length, 2), dtype=np.int64), text, 0, np.arange(length))
    fusable = np.arange(length) < length - 1
    return EncodedExample(AlignedRow(reading, fusable, ((reading, np.arange(length)),)), Response(ids[length:]))


class Step:
    """A training step without Trainer, and its parts one by one.

    Args:
        pair: The models.
        batch: What to learn.
    """

    def __init__(self, pair: CacheToCache, batch: TrainingBatch) -> None:
        self.pair, self.batch, self.fuser = pair, batch, pair.fusers[0].train()
        self.optimizer = torch.optim.AdamW(self.fuser.parameters(), lr=1e-6, fused=True)
        with torch.no_grad():
            streams = pair.read(batch.prompt)
        self.mine, self.theirs = read_cache(streams.receiver), read_cache(streams.sharers[0])
        self.theirs = KV(*(part[..., : self.mine.key.shape[3], :] for part in (self.theirs.key, self.theirs.value)))
        self.whole()  # the optimizer has its state from now on
        self.gradient = [torch.randn_like(part) for part in (self.mine.key, self.mine.value)]

    def whole(self, recompute: bool = False) -> None:
        """All of it, as Trainer does it."""
        self.learn(recompute)
        self.optimize()

    def learn(self, recompute: bool = False) -> Tensor:
        """Loss and gradients, added to those that are there."""
        self.fuser.recompute = recompute
        loss = response_loss(self.pair, self.batch, recompute=recompute)
        loss.backward()
        return loss.detach()

    def parts(self) -> dict[str, Callable[[], None]]:
        """What no step can do without, by name."""
        return {
            "receiver prefill": lambda: self._prefill(self.pair.receiver.model, self.batch.prompt.ids[:, :-1]),
            "sharer prefill": lambda: self._prefill(self.pair.sharers[0].model, self.batch.prompt.sharers[0].ids),
            "fuser": self._fuse,
            "response": self._respond,
            "optimizer": self.optimize,
        }

    def optimize(self) -> None:
        """Clip, step, and gradients back to zero."""
        torch.nn.utils.clip_grad_norm_(self.fuser.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    @torch.no_grad()
    def _prefill(self, model: Any, ids: Tensor) -> None:
        model.base_model(ids, use_cache=True, **{CACHE: DynamicCache(config=model.config)})

    def _fuse(self) -> None:
        self.fuser.recompute = False  # whatever ran before
        residual = self.fuser(receiver=self.mine, sharer=self.theirs)
        torch.autograd.backward([residual.key, residual.value], self.gradient)

    def _respond(self) -> None:
        prefix = KV(*(part.detach().requires_grad_() for part in (self.mine.key, self.mine.value)))
        tail = self.batch.tail
        self.pair.receiver.model(
            tail.ids, use_cache=False, labels=self.batch.labels, **{CACHE: cache_of(prefix)}
        ).loss.backward()


def random_step(pair: CacheToCache, batch: int) -> Step:
    """A step of random examples."""
    return Step(pair, collate([random_example(seed) for seed in range(batch)]))


def step_rows(step: Step, setting: str, repeats: int) -> Iterator[Row]:
    """A step against its parts, and with recomputation."""
    runs: dict[str, Callable[[], Any]] = {
        "step": step.whole,
        "recomputed": partial(step.whole, recompute=True),
        **step.parts(),
    }
    taken = in_turns({name: partial(timed, run) for name, run in runs.items()}, repeats)
    bare = total(*(taken[name] for name in step.parts()))
    yield spread_row("step / bare parts", setting, ratio(taken["step"], bare), 1.15, "x")
    yield spread_row("step with recomputation / bare parts", setting, ratio(taken["recomputed"], bare), None, "x")
    for name, seconds in taken.items():
        yield spread_row(name, setting, seconds, None, "s")
    peaks = [peak_bytes(partial(step.learn, recompute)) for recompute in (False, True)]
    yield row("memory", setting, peaks[0] / 2**20, None, "MiB")
    yield row("memory with recomputation / without", setting, peaks[1] / peaks[0], 0.45, "x")


def equality_rows(step: Step, setting: str) -> Iterator[Row]:
    """Whether recomputation changes anything, without dropout, whose masks are drawn piece by piece."""
    for module in step.fuser.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients, losses = [], []
    for recompute in (False, True):
        step.optimizer.zero_grad(set_to_none=False)
        torch.manual_seed(0)
        losses.append(float(step.learn(recompute)))
        found = [parameter.grad for parameter in step.fuser.parameters() if parameter.grad is not None]
        gradients.append(found if recompute else [gradient.clone() for gradient in found])
    largest = max(
        float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))
        for one, other in zip(*gradients, strict=True)
    )
    yield row("loss, recomputed - not", setting, losses[1] - losses[0], None, "nats")
    yield row("largest difference of a gradient", setting, largest, 1e-3, "x")


def epoch_rows(shapes: str, batch: int, kind: str, examples: int = 6) -> Iterator[Row]:
    """An epoch with caches kept on disk against the first, which reads the prompts and keeps them."""
    pair = random_pair(shapes, kind)
    rows = Dataset.from_list([to_columns(random_example(seed)) for seed in range(examples)])
    for keep in ("sharer", "both"):
        clock = _EpochClock()
        with tempfile.TemporaryDirectory() as folder:
            train = TrainSection(epochs=4, batch_size=batch, learning_rate=1e-6, keep_caches=keep)
            trainer = FuserTrainer(pair, train, rows, Path(folder, "checkpoints"), quiet=True)
            trainer.add_callback(clock)
            start = time.perf_counter()
            trainer.resume()
        first, *later, _ = np.diff([start, *clock.ends])  # the last one writes the run's checkpoint too
        setting = f"{shapes}, batch {batch}, {kind}, caches of {keep}"
        yield row("epoch / first epoch", setting, statistics.median(later) / first, 0.75, "x")


class _EpochClock(TrainerCallback):
    """When each epoch ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def main(
    shapes: Annotated[
        str, typer.Option(help="mid (about 50M parameters each) or true (Qwen3-0.6B <- Qwen2.5-0.5B).")
    ] = "mid",
    batch: Annotated[int, typer.Option(help="Examples of a step.")] = 1,
    repeats: Annotated[int, typer.Option(help="Of each measurement.")] = 5,
    epochs: Annotated[bool, typer.Option(help="Measure epochs with kept caches too.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    report(_rows(shapes, batch, repeats, epochs), json_file)


def _rows(shapes: str, batch: int, repeats: int, epochs: bool) -> Iterator[Row]:
    step, setting = random_step(random_pair(shapes), batch), f"{shapes}, batch {batch}"
    yield from step_rows(step, setting, repeats)
    yield from equality_rows(step, setting)
    del step  # its pair and optimizer are half of the memory that the next ones may take
    for kind in ("c2c", "low-rank") if epochs else ():
        yield from epoch_rows(shapes, batch, kind)


if __name__ == "__main__":
    typer.run(main)
