"""Which gate trains faster, and forgets less of what the receiver knew: on the embedded pair.

python -m benchmarks.gates [--steps N] [--seeds 0 --seeds 1 …] [--variants NAME …] [--json FILE]

A minute or two per run on one core; docs/gates.md has the results.

Every variant is the recipe of the embedded pair with a few overrides, trained with each seed on the training places.
Everything is measured on the validation places: no fuser has seen them, and no accuracy in the README is about them.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kvfuse.demo.build import SEEDS
from kvfuse.demo.pair_folder import PairFolder
from kvfuse.demo.questions import Question, all_questions
from kvfuse.demo.score import as_prompt, ask_all, is_right, sample
from kvfuse.methods import Fused, Single
from kvfuse.training.data.encoding import Encoder
from kvfuse.training.data.examples import Example
from kvfuse.training.data.prepare import split
from kvfuse.training.loop.trainer import FuserTrainer
from kvfuse.training.loop.validation import Validation
from kvfuse.training.recipe import Recipe, load_recipe
from kvfuse.training.run import new_pair, prepare_data
from kvfuse.training.run_metadata import versions

RECIPE = "recipes/embedded.yaml"
PER_TOKEN, PER_GATE, GUMBEL = (f"fuser.gate_noise={noise}" for noise in ("logistic-per-token", "logistic", "gumbel"))
ZERO, SLOW = "fuser.gate_init=0", "train.gate_learning_rate=4.0e-3"  # slow: the rate of the rest of the fuser
VARIANTS = {  # the recipe's gates start at 1
    "per token": [PER_TOKEN],
    "per gate": [PER_GATE],
    "gumbel": [GUMBEL],
    "per token, init 0": [PER_TOKEN, ZERO],
    "per gate, init 0": [PER_GATE, ZERO],
    "gumbel, init 0": [GUMBEL, ZERO],
    "per gate, init 0, slow": [PER_GATE, ZERO, SLOW],
    "gumbel, init 0, slow": [GUMBEL, ZERO, SLOW],  # the paper's
    "per gate, init 3": [PER_GATE, "fuser.gate_init=3"],
    "no gate": ["fuser.gate=none"],
}
NUM_POINTS = 6
"""Steps of a run at which the held-out loss is measured."""
LOSS_QUESTIONS = 200
HEADER = "| variant | bits at the first point | at half | at the end | right, % | kept, % | open gates |"


class LossCurve(TrainerCallback):
    """Records the held-out loss along a run, with gates open or closed as at inference."""

    def __init__(self, validation: Validation, steps: int) -> None:
        self.validation = validation
        self.points = {round(steps * (i + 1) / NUM_POINTS) for i in range(NUM_POINTS)}
        self.bits: dict[int, float] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Trainer's hook."""
        if state.global_step in self.points:
            self.bits[state.global_step] = self.validation.measure().fused


def run(recipe: Recipe, questions: list[Question], knew: Any) -> dict[str, Any]:
    """Train one fuser and ask all questions.

    Args:
        recipe: Of the variant, with its seed.
        questions: To ask; a sample of them gives the held-out loss.
        knew: ``(questions,)`` bool: those that the receiver alone answers right.
    """
    # 1) Training data, and the questions of the loss.
    training, _ = split(prepare_data(recipe, lambda line: None, quiet=True).examples, recipe.data.validation_share)
    pair = new_pair(recipe)
    asked = sample(questions, LOSS_QUESTIONS)
    examples = [Encoder.of(pair).encode(Example(as_prompt(question.text), question.answer)) for question in asked]
    curve = LossCurve(Validation(pair, examples, [len(question.answer) for question in asked]), recipe.train.steps or 0)
    # 2) Train.
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = FuserTrainer(pair, recipe.train, training, Path(folder), quiet=True)
        trainer.add_callback(curve)
        trainer.resume()
    seconds = time.perf_counter() - start
    # 3) Ask.
    pair.fusers[0].eval()
    right = is_right(ask_all(Fused(pair), questions))
    rows: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        rows.setdefault(question.kind, []).append(index)
    return {
        "seed": recipe.train.seed,
        "bits": curve.bits,
        "accuracy": float(right.mean()),
        "kinds": {kind: float(right[of_kind].mean()) for kind, of_kind in sorted(rows.items())},
        "kept": float(right[knew].mean()),
        "open": {name: opened.int().tolist() for name, opened in pair.fusers[0].open_gates().items()},
        "seconds": seconds,
    }


def summary(name: str, runs: list[dict[str, Any]]) -> str:
    """Returns a variant's row of the table: mean and range over seeds."""
    # losses at three of the measured steps, then accuracies, then open gates
    points = list(runs[0]["bits"])
    half, end = points[len(points) // 2 - 1], points[-1]
    gates = [sum(map(sum, of_seed["open"].values())) for of_seed in runs]
    columns = [_spread([of_seed["bits"][point] for of_seed in runs], "{:.3f}") for point in (points[0], half, end)]
    columns += [_spread([100 * of_seed[figure] for of_seed in runs], "{:.1f}") for figure in ("accuracy", "kept")]
    columns.append(", ".join(map(str, gates)) if runs[0]["open"] else "")
    return f"| {name} | {' | '.join(columns)} |"


def _spread(values: list[float], form: str) -> str:
    mean, low, high = (form.format(value) for value in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} [{low}, {high}]"


def main(
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 300,
    seeds: Annotated[list[int] | None, typer.Option(help="Seeds of each variant; by default 0, 1 and 2.")] = None,
    variants: Annotated[list[str] | None, typer.Option(help="By default all.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all runs to this file, after each.")] = None,
) -> None:
    """Train and ask every variant, then print the table."""
    torch.set_num_threads(1)
    folder = PairFolder()
    questions = all_questions(folder.places, "validation")
    knew = is_right(ask_all(Single("receiver", folder.receiver), questions))
    known = f"of which the receiver alone has {int(knew.sum())} right"
    typer.echo(f"{len(questions)} questions about validation places, {known}; {steps} steps")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants or VARIANTS}
    # seed by seed, so that an early end leaves all variants equally often measured
    for seed in seeds or SEEDS:
        for name in runs:
            words = [f"train.steps={steps}", f"train.save_steps={steps}", f"train.seed={seed}", *VARIANTS[name]]
            runs[name].append(run(load_recipe(RECIPE, words), questions, knew))
            typer.echo(f"{name}: {json.dumps(runs[name][-1])}", err=True)
            if json_file:
                content = {"steps": steps, "questions": len(questions), "versions": versions(), "variants": runs}
                json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    typer.echo(HEADER)
    for name, of_variant in runs.items():
        typer.echo(summary(name, of_variant))


if __name__ == "__main__":
    typer.run(main)
