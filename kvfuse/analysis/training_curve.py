"""Accuracy against the tokens of training: a new fuser, evaluated while it learns (paper, table 12)."""

import tempfile
from pathlib import Path
from typing import Any

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
from kvfuse.support.plots import Figure
from kvfuse.training.data.columns import to_columns
from kvfuse.training.data.encoding import Encoder
from kvfuse.training.data.examples import Example
from kvfuse.training.data.sources import import_datasets
from kvfuse.training.loop.trainer import FuserTrainer
from kvfuse.training.recipe import TrainSection

STEPS, SMOKE_STEPS = (15, 30, 60), (2,)
LEARNING_RATE = 4e-3  # that of the embedded pair; for seconds of training, not for hours


def train_and_ask(study: Study) -> Finding:
    """Train a new fuser of the pair's own configuration on the study's lessons, and ask the questions at a few steps.

    Raises:
        AnalysisError: There are no lessons.
    """
    if not study.lessons:
        raise AnalysisError("expected runs to compare for a pair of your own, got none; give runs=[FOLDER, ...]")
    # 1) Encode the lessons for the pair with a new fuser.
    steps, pair = SMOKE_STEPS if study.smoke else STEPS, _untrained(study)
    encoder = Encoder.of(pair)
    examples = [Example(question.prompt, str(question.answer)) for question in study.lessons]
    rows = import_datasets().Dataset.from_list([to_columns(encoder.encode(example)) for example in examples])
    # 2) Train it; the callback asks.
    callback = _AskAtSteps(study, pair, steps)
    train = TrainSection(steps=steps[-1], batch_size=32, learning_rate=LEARNING_RATE, save_steps=10**6, seed=study.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = FuserTrainer(pair, train, rows, Path(folder), quiet=True)
        trainer.add_callback(callback)
        trainer.resume()
    # 3) Ask the receiver alone and the pair's own fuser, for comparison.
    figures = {
        "questions": len(study.questions),
        "parameters": pair.fusers[0].num_parameters(),
        "steps": list(steps),
        "tokens": callback.tokens,
        "asked": callback.asked,
        "receiver": ask(study, make_method("receiver", pair)).to_dict(),
        "own_fuser": ask(study, make_method("cache-to-cache", study.pair)).to_dict(),
    }
    return Finding(figures, reading(figures), lambda: draw(figures))


def reading(figures: dict[str, Any]) -> str:
    """Two sentences: the new fuser, and the pair's own."""
    receiver, last, own = (
        f"{100 * found['accuracy']:.1f}% right answers and {found['bits_per_character']:.2f} bits per character of them"
        for found in (figures["receiver"], figures["asked"][-1], figures["own_fuser"])
    )
    trained = f"{figures['steps'][-1]} steps, {figures['tokens'][-1]:,} tokens"
    return (
        f"A new fuser of {figures['parameters']:,} parameters has, after {trained}, {last}, where the receiver alone "
        f"has {receiver}. The pair's own, trained to its end, has {own}."
    )


def draw(figures: dict[str, Any]) -> Figure:
    """By tokens of training, with the receiver and the pair's own fuser as levels."""
    series = {"a new fuser": ([tokens / 1000 for tokens in figures["tokens"]], figures["asked"])}
    levels = {"receiver": figures["receiver"], "the pair's own fuser": figures["own_fuser"]}
    return curves("training tokens (thousands)", series, levels)


def _untrained(study: Study) -> CacheToCache:
    """The same models with the fuser as it was before training."""
    own, device = study.pair.fusers[0], study.pair.receiver.model.device
    # the same weights for the same seed, without a trace in the caller's random numbers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.seed)
        fuser: Fuser = type(own)(own.config)
        fuser.reset_parameters()
    return CacheToCache(study.pair.receiver, study.pair.sharers[:1], [fuser.to(device)])


class _AskAtSteps(TrainerCallback):
    """Asks all questions at some steps, without a trace in the training's random numbers."""

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
