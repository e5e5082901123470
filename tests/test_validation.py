"""Held-out loss: the receiver alone, fused, and with a sharer that read something else; and what a run makes of it."""

import json

import pytest
import torch
from datasets import Dataset
from helpers import assert_same_tensors
from safetensors.torch import load_file

from kvfuse.errors import RecipeError
from kvfuse.evaluation.scoring.statistics import MIN_ITEMS
from kvfuse.methods.donors import choose_donors
from kvfuse.model import CacheToCache
from kvfuse.testing import tiny_fuser
from kvfuse.training.data.columns import to_columns
from kvfuse.training.data.encoding import Encoder
from kvfuse.training.data.examples import Example
from kvfuse.training.loop.batches import collate
from kvfuse.training.loop.loss import example_losses, response_loss
from kvfuse.training.loop.trainer import FuserTrainer
from kvfuse.training.loop.validation import Gain, Validation, mismatch
from kvfuse.training.recipe import TrainSection

RESPONSES = ["It is Oslo.", "They speak Dutch there.", "The receiver answers."]


def encoded(pair):
    return [Encoder.of(pair).encode(Example(f"What is number {i}?", response)) for i, response in enumerate(RESPONSES)]


def validation(pair):
    return Validation(pair, encoded(pair), list(map(len, RESPONSES)))


@pytest.fixture(params=[False, True], ids=["prompts", "responses"])
def some_pair(request, receiver, sharer):
    return CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, fuse_response=request.param)])


def test_closed_gates_measure_as_the_receiver_alone(some_pair):
    some_pair.fusers[0].gate.logit.data.fill_(-1)
    gain = validation(some_pair).measure()
    assert gain.fused == pytest.approx(gain.receiver, rel=1e-5)
    assert gain.mismatched == pytest.approx(gain.receiver, rel=1e-5)


def test_the_receiver_alone_needs_as_many_bits_as_its_own_loss_says(some_pair):
    nats = 0.0
    for one in encoded(some_pair):
        ids = torch.cat([torch.from_numpy(part) for part in (one.prompt.receiver.ids, one.response.ids)])[None]
        logits = some_pair.receiver.model(ids).logits[0, len(one.prompt.receiver.ids) - 1 : -1]
        nats += float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(one.response.ids), reduction="sum"))
    bits = nats / torch.log(torch.tensor(2.0)).item() / sum(map(len, RESPONSES))
    assert validation(some_pair).receiver == pytest.approx(bits, rel=1e-4)


def test_a_mismatched_sharer_changes_what_is_fused_and_nothing_else(some_pair):
    gain = validation(some_pair).measure()
    assert gain.mismatched != pytest.approx(gain.fused, rel=1e-6)
    one, other = encoded(some_pair)[:2]
    swapped = mismatch(one, other)
    assert swapped.prompt.receiver is one.prompt.receiver
    assert swapped.response.ids is one.response.ids
    assert [reading.ids.tolist() for reading, _ in swapped.prompt.sharers] == [
        reading.ids.tolist() for reading, _ in other.prompt.sharers
    ]
    assert mismatch(one, one).prompt.sharers[0][1].tolist() == one.prompt.sharers[0][1].tolist()


def test_measuring_leaves_the_fuser_in_training(some_pair):
    some_pair.fusers[0].train()
    validation(some_pair).measure()
    assert some_pair.fusers[0].training


def test_a_loss_that_is_no_number_is_refused(some_pair):
    next(some_pair.fusers[0].parameters()).data.fill_(float("nan"))
    with pytest.raises(RecipeError, match="finite loss"):
        validation(some_pair).measure()


@pytest.mark.parametrize(
    ("fused", "gain", "mismatched", "content", "words"),
    [
        (
            0.9,
            (0.05, 0.15),
            1.2,
            (0.2, 0.4),
            "The fused receiver beats the receiver alone by 0.100 [0.050, 0.150] bits",
        ),
        (
            0.9,
            (0.05, 0.15),
            1.2,
            (0.2, 0.4),
            "and a sharer that read this example beats one that read another by 0.300",
        ),
        (
            0.9,
            (0.05, 0.15),
            0.9,
            (-0.1, 0.1),
            "no part of it can be shown to need the sharer to have read this example",
        ),
        (0.9, (0.05, 0.15), None, None, "without a control, no part of it is known to be communication."),
        (0.9, (-0.05, 0.25), 1.2, (0.2, 0.4), "does NOT beat the receiver alone: no gain can be shown (0.100 ["),
        (1.1, (-0.15, -0.05), 1.2, (0.2, 0.4), "does NOT beat the receiver alone: it is worse (-0.100 ["),
    ],
)
def test_the_verdict_looks_at_intervals_and_at_the_control(fused, gain, mismatched, content, words):
    assert words in str(Gain(1.0, fused, mismatched, MIN_ITEMS, gain, content))
    few = str(Gain(1.0, fused, mismatched, MIN_ITEMS - 1, gain, content))
    assert "No verdict: it takes at least 20 held-out responses" in few
    assert "beat" not in few


@pytest.mark.parametrize("count", [1, 2])
def test_an_example_without_another_has_no_control(some_pair, count):
    """The only one of its run, or all with one prompt."""
    gain = Validation(some_pair, [encoded(some_pair)[0]] * count, [len(RESPONSES[0])] * count).measure()
    assert (gain.mismatched, gain.content_interval) == (None, None)
    assert (gain.gain_interval is None) == (count == 1)
    assert "no control, since no example has another one to read" in str(gain)
    assert "another example" not in gain.table()


def test_donors_are_chosen_as_everywhere(some_pair):
    examples = encoded(some_pair)
    donors = choose_donors(examples, key=lambda example: len(example.prompt.receiver.ids))
    for swapped, donor in zip(validation(some_pair).mismatched, donors, strict=True):
        assert swapped.prompt.sharers[0][0].ids.tolist() == examples[donor].prompt.sharers[0][0].ids.tolist()


def test_intervals_are_of_paired_differences(some_pair):
    gain = validation(some_pair).measure()
    for difference, (low, high) in (
        (gain.receiver - gain.fused, gain.gain_interval),
        (gain.mismatched - gain.fused, gain.content_interval),
    ):
        assert low <= difference <= high
        assert low < high


@torch.no_grad()
def test_losses_of_examples_add_up_to_the_loss_of_their_batch(some_pair):
    batch = collate(encoded(some_pair))
    losses = example_losses(some_pair, batch)
    assert losses.shape == (len(RESPONSES),)
    assert float(losses.sum()) == pytest.approx(float(response_loss(some_pair, batch, num_items=1)), rel=1e-5)


def test_the_table_has_all_three_against_the_receiver():
    rows = Gain(2.0, 1.0, 1.9, 3).table().splitlines()
    assert [row.split("|")[2:4] for row in rows[2:]] == [
        [" 2.000 ", " +0.0% "],
        [" 1.000 ", " -50.0% "],
        [" 1.900 ", " -5.0% "],
    ]


class Scripted(Validation):
    """Measures given losses, one at each checkpoint."""

    def __init__(self, pair, losses):
        super().__init__(pair, encoded(pair), list(map(len, RESPONSES)))
        self.losses = iter(losses)

    def measure(self):
        return Gain(1.0, next(self.losses), 1.0, 3)


def run(pair, folder, losses, **options):
    rows = Dataset.from_list(list(map(to_columns, encoded(pair))))
    section = TrainSection(batch_size=1, learning_rate=1e-2, save_steps=2, **options)
    trainer = FuserTrainer(pair, section, rows, folder, Scripted(pair, losses), quiet=True)
    trainer.resume()
    return trainer.state


def test_the_fuser_ends_as_it_was_at_the_best_checkpoint(some_pair, tmp_path):
    state = run(some_pair, tmp_path, [0.9, 0.5, 0.8, 0.7], steps=7)
    assert state.global_step == 7
    assert state.best_model_checkpoint.endswith("checkpoint-4")
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert_same_tensors(some_pair.fusers[0].state_dict(), best)


def test_a_run_that_gets_no_better_ends_early(some_pair, tmp_path):
    assert run(some_pair, tmp_path, [0.9, 0.95, 0.93, 0.5, 0.4], steps=10, patience=2).global_step == 6


def test_the_log_has_all_three(some_pair, tmp_path):
    state = run(some_pair, tmp_path, [0.9], steps=2)
    measured = next(entry for entry in state.log_history if "eval_fused" in entry)
    assert (measured["eval_receiver"], measured["eval_fused"], measured["eval_mismatched"]) == (1.0, 0.9, 1.0)
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["best_metric"] == 0.9
