"""Accuracy against the tokens of training: a new fuser, asked while it learns (paper, table 12)."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kvfuse.analysis.answering import ask
from kvfuse.analysis.curves import curves
from kvfuse.analysis.finding import Finding
from kvfuse.analysis.study import Study
from kvfuse.errors import AnalysisError
from kvfuse.fusers import Fuser
from kvfuse.methods import make_method
from kvfuse.model import CacheToCache
from kvfuse.training.data.columns import to_columns
from kvfuse.training.data.encoding import Encoder
from kvfuse.training.data.examples import Example
from kvfuse.training.data.sources import import_datasets
from kvfuse.training.loop.trainer import FuserTrainer
from kvfuse.training.recipe import TrainSection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, SMOKE_STEPS = (15, 30, 60), (2,)
LEARNING_RATE = 4e-3  # that of the embedded pair; for seconds of training, not for hours


def train_and_ask(study: Study) -> Finding:
    """Train a fuser of the pair's own configuration on the study's lessons, and put the questions to it at some steps.

    Raises:
        AnalysisError: There are no lessons.
    """
    if not study.lessons:
        raise AnalysisError("expected runs to compare for a pair of your own, got none; give runs=[FOLDER, ...]")
    steps, pair = SMOKE_STEPS if study.smoke else STEPS, _untrained(study)
    watch = _Watch(study, pair, steps)
    with tempfile.TemporaryDirectory() as folder:
        train = TrainSection(
            steps=steps[-1], batch_size=32, learning_rate=LEARNING_RATE, save_steps=10**6, seed=study.seed
        )
        trainer = FuserTrainer(pair, train, _encoded(study, pair), Path(folder), quiet=True)
        trainer.add_callback(watch)
        trainer.resume()
    figures = {
        "questions": len(study.questions),
        "parameters": pair.fusers[0].num_parameters(),
        "steps": list(steps),
        "tokens": watch.tokens,
        "asked": watch.asked,
        "receiver": ask(study, make_method("receiver", pair)).to_dict(),
        "own_fuser": ask(study, make_method("cache-to-cache", study.pair)).to_dict(),
    }
    return Finding(figures, reading(figures), lambda: draw(figures))


def reading(figures: dict[str, Any]) -> str:
    """Two sentences: the new fuser, and what the pair's own has come to."""
    receiver, last, own = (
        f"{100 * one['accuracy']:.1f}% right answers and {one['bits_per_character']:.2f} bits per character of them"
        for one in (figures["receiver"], figures["asked"][-1], figures["own_fuser"])
    )
    trained = f"{figures['steps'][-1]} steps, {figures['tokens'][-1]:,} tokens"
    return (
        f"A new fuser of {figures['parameters']:,} parameters has, after {trained}, {last}, where the receiver alone has {receiver}. "
        f"The pair's own, trained to its end, has {own}."
    )


def draw(figures: dict[str, Any]) -> "Figure":
    """By tokens of training, with the receiver and the pair's own fuser as levels."""
    series = {"a new fuser": ([tokens / 1000 for tokens in figures["tokens"]], figures["asked"])}
    return curves(
        "training tokens (thousands)",
        series,
        {"receiver": figures["receiver"], "the pair's own fuser": figures["own_fuser"]},
    )


def _untrained(study: Study) -> CacheToCache:
    """The same models with a fuser as it is before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.seed)
        fuser: Fuser = type(study.pair.fusers[0])(study.pair.fusers[0].config)
        fuser.reset_parameters()
    return CacheToCache(study.pair.receiver, study.pair.sharers[:1], [fuser.to(study.pair.receiver.model.device)])


def _encoded(study: Study, pair: CacheToCache) -> Any:
    encoder = Encoder.of(pair)
    rows = [to_columns(encoder.encode(Example(one.prompt, str(one.answer)))) for one in study.lessons]
    return import_datasets().Dataset.from_list(rows)


class _Watch(TrainerCallback):
    """Asks at some steps; the noise of training goes on as if nobody had."""

    def __init__(self, study: Study, pair: CacheToCache, steps: tuple[int, ...]) -> None:
        self.study, self.pair, self.steps = study, pair, steps
        self.tokens: list[int] = []
        self.asked: list[dict[str, Any]] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Trainer's hook."""
        if state.global_step in self.steps:
            self.pair.fusers[0].eval()
            self.tokens.append(int(state.num_input_tokens_seen))
            self.asked.append(ask(self.study, make_method("cache-to-cache", self.pair)).to_dict())
            self.pair.fusers[0].train()
