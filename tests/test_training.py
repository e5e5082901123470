import json
import re

import pytest
import torch
from datasets import Dataset
from helpers import assert_same_tensors
from runs import write_recipe
from safetensors.torch import load_file
from transformers import TrainerCallback

from kvfuse.errors import PromptError, RecipeError
from kvfuse.fusers import describe_gates
from kvfuse.model import CacheToCache
from kvfuse.prompts.messages import as_chat
from kvfuse.testing import tiny_fuser
from kvfuse.training.data.columns import to_columns
from kvfuse.training.data.encoding import Encoder
from kvfuse.training.data.examples import Example
from kvfuse.training.loop.batches import IGNORED, collate
from kvfuse.training.loop.loss import response_loss
from kvfuse.training.loop.trainer import FuserTrainer
from kvfuse.training.loop.validation import Validation
from kvfuse.training.recipe import TrainSection, load_recipe
from kvfuse.training.run import prepare_data, train

EXAMPLES = [
    Example([{"role": "user", "content": f"What is {i}?"}], f"It is number {i} of them"[: 10 + i]) for i in range(8)
]


@pytest.fixture
def encoded(pair):
    return list(map(Encoder.of(pair).encode, EXAMPLES))


def fresh_pair(receiver, sharer, **options):
    return CacheToCache(receiver, [sharer], [tiny_fuser(receiver, sharer, zero_init=True, **options)])


def trainer(pair, encoded, folder, **changes):
    options = {"steps": 6, "batch_size": 2, "accumulation": 2, "learning_rate": 1e-2, "save_steps": 3, **changes}
    return FuserTrainer(
        pair, TrainSection(**options), Dataset.from_list(list(map(to_columns, encoded))), folder, quiet=True
    )


def weights_of_models(*models):
    return {
        f"{index}.{name}": tensor.clone()
        for index, one in enumerate(models)
        for name, tensor in one.model.state_dict().items()
    }


def weights(pair):
    return {name: tensor.clone() for name, tensor in pair.fusers[0].state_dict().items()}


def test_only_the_response_is_labelled(pair, encoded):
    batch = collate(encoded)
    for row, (example, one) in enumerate(zip(EXAMPLES, encoded, strict=True)):
        labelled = batch.labels[row][batch.labels[row] != IGNORED]
        assert labelled.tolist() == one.response.ids.tolist()
        assert pair.receiver.tokenizer.decode(labelled, skip_special_tokens=True) == example.response
        assert labelled[-1] == pair.receiver.tokenizer.eos_token_id
        assert batch.tail.ids[row, 0] == batch.prompt.ids[row, -1]


@torch.no_grad()
def test_batch_loss_is_the_token_weighted_mean_of_single_losses(pair, encoded):
    losses = [response_loss(pair, collate([one])) for one in encoded]
    counts = [len(one.response.ids) for one in encoded]
    expected = sum(float(loss) * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    batch = collate(encoded)
    assert float(response_loss(pair, batch)) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_loss_over_a_cache_equals_a_full_forward(pair, encoded):
    """Unfused, the split into prompt and response changes nothing."""
    one = encoded[3]
    ids = torch.cat([torch.from_numpy(part) for part in (one.prompt.receiver.ids, one.response.ids)])[None]
    labels = ids.clone()
    labels[0, : len(one.prompt.receiver.ids)] = IGNORED
    expected = pair.receiver.model(ids, labels=labels).loss
    batch = collate([one])
    assert float(response_loss(pair, batch, fusers=[])) == pytest.approx(float(expected), rel=1e-5)


def test_training_moves_every_fuser_parameter_and_nothing_else(receiver, sharer, encoded, tmp_path):
    pair = fresh_pair(receiver, sharer)
    frozen = weights_of_models(receiver, sharer)
    before, validation = weights(pair), Validation(pair, encoded, [1] * len(encoded))
    start = validation.measure()
    trainer(pair, encoded, tmp_path, steps=20).resume()
    pair.fusers[0].eval()
    assert [name for name, after in weights(pair).items() if torch.equal(before[name], after)] == []
    assert_same_tensors(weights_of_models(receiver, sharer), frozen)
    assert validation.measure().fused < start.fused == pytest.approx(start.receiver), (
        "it starts from a residual of zero"
    )


@pytest.mark.parametrize("changes", [{}, {"group_by_length": True}], ids=["shuffled", "by length"])
def test_an_interrupted_run_resumes_to_the_same_weights(receiver, sharer, encoded, tmp_path, changes):
    """With dropout, gate noise and accumulation; bit for bit."""

    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    whole = fresh_pair(receiver, sharer)
    trainer(whole, encoded, tmp_path / "whole", **changes).resume()
    killed = trainer(fresh_pair(receiver, sharer), encoded, tmp_path / "killed", **changes)
    killed.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        killed.resume()
    resumed = fresh_pair(receiver, sharer)
    torch.manual_seed(99)
    trainer(resumed, encoded, tmp_path / "killed", **changes).resume()
    assert_same_tensors(weights(resumed), weights(whole))


def test_batches_of_like_length_have_less_padding(pair, tmp_path):
    examples = [Example("word " * length, "a") for length in (2, 30) * 32]
    encoded = list(map(Encoder.of(pair).encode, examples))

    def padding(**changes):
        loader = trainer(pair, encoded, tmp_path, accumulation=1, **changes).get_train_dataloader()
        return sum(int((batch["batch"].prompt.mask == 0).sum()) for batch in loader)

    assert padding(group_by_length=True) < padding() / 2


def test_every_epoch_is_mixed_anew(pair, encoded, tmp_path):
    loader = trainer(pair, encoded, tmp_path, group_by_length=True).get_train_dataloader()

    def order(epoch):
        loader.set_epoch(epoch)
        return [batch["batch"].tail.ids.tolist() for batch in loader]

    first, second = order(0), order(1)
    assert first != second
    assert order(0) == first


def test_gates_have_their_own_learning_rate_and_no_decay(pair, encoded, tmp_path):
    groups = trainer(pair, encoded, tmp_path).create_optimizer().param_groups
    gate = next(group for group in groups if any(p is pair.fusers[0].gate.logit for p in group["params"]))
    assert (gate["lr"], gate["weight_decay"]) == (pytest.approx(0.2), 0.0)
    assert sum(len(group["params"]) for group in groups) == len(list(pair.fusers[0].parameters()))


def test_temperature_falls_over_the_runs_own_steps(pair, encoded, tmp_path):
    trainer(pair, encoded, tmp_path, steps=4).resume()
    assert pair.fusers[0].gate.temperature == pytest.approx(0.001 ** (3 / 4)), "set before the last of four steps"


def test_an_example_longer_than_the_context_is_refused(pair):
    with pytest.raises(PromptError, match="fit 256 tokens"):
        Encoder.of(pair).encode(Example("short", "word " * 300))


@pytest.fixture
def recipe(saved_models, tmp_path):
    return write_recipe(tmp_path, saved_models, [f"number {i}" for i in range(10)], train={"steps": 2, "batch_size": 4})


def test_a_run_leaves_a_fuser_that_answers_and_its_recipe(recipe, tmp_path):
    said = []
    gain = train(load_recipe(recipe), said.append)
    pair = CacheToCache.from_pretrained(fuser=tmp_path / "out" / "fuser")
    assert pair.generate("What is 3?", max_new_tokens=3).shape[1] > len(pair.align("What is 3?").receiver.ids)
    held_out = [Encoder.of(pair).encode(Example(as_chat(f"What is {i}?"), f"number {i}")) for i in (8, 9)]
    for name, value in vars(Validation(pair, held_out, [8, 8]).measure()).items():
        assert value == pytest.approx(getattr(gain, name), rel=1e-5, abs=1e-5), name
    assert json.loads((tmp_path / "out" / "result.json").read_text())["fused"] == gain.fused
    assert "hidden_dim: 8" in (tmp_path / "out" / "recipe.yaml").read_text()
    card = (tmp_path / "out" / "fuser" / "README.md").read_text()
    assert str(gain) in card
    assert gain.table() in card
    assert (said[0], said[1].split(":")[0], said[-1].split()[-1]) == ("examples: 10", "trainable", "second")
    assert said[-2] == describe_gates(pair.fusers[0]) != ""


def test_a_solved_fuser_is_fitted_saved_and_reported_like_any_other(saved_models, tmp_path):
    fuser = {"kind": "ridge", "num_sources": 1}
    recipe = write_recipe(tmp_path, saved_models, [f"number {i}" for i in range(10)], fuser=fuser)
    said = []
    train(load_recipe(recipe), said.append)
    fuser = CacheToCache.from_pretrained(fuser=tmp_path / "out" / "fuser").fusers[0]
    assert 0 < fuser.weight.max() <= 0.25, "fitted: it starts at one"
    assert said[-2] == describe_gates(fuser)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_run_into_the_folder_of_another_recipe_is_refused(recipe, tmp_path):
    train(load_recipe(recipe), lambda line: None)
    with pytest.raises(RecipeError, match="begun by another"):
        train(load_recipe(recipe, ["train.steps=3"]), lambda line: None)


def test_a_run_begun_by_version_0_1_can_be_resumed(recipe, tmp_path):
    loaded = load_recipe(recipe)
    train(loaded, lambda line: None)
    saved = tmp_path / "out" / "recipe.yaml"
    saved.write_text(saved.read_text().replace("train:\n", "train:\n  start: random\n"))
    for written_since in ("train-inputs.json", "result.json"):
        (tmp_path / "out" / written_since).unlink()
    train(loaded, lambda line: None)
    assert "start" not in saved.read_text()


@pytest.mark.parametrize("override", ["data.path=nowhere.jsonl", "fuser.layer_alignment=[0]", "train.fsdp=true"])
def test_nothing_is_written_before_everything_is_checked(recipe, tmp_path, override):
    with pytest.raises(Exception, match="expected"):
        train(load_recipe(recipe, [override]), lambda line: None)
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_listed_and_the_rest_is_learnt(recipe, tmp_path):
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write('\n{"prompt": "q", "response": ""}')
    said = []
    train(load_recipe(recipe, ["data.max_bad_share=0.1"]), said.append)
    assert said[0] == "examples: 10; bad: 1 empty response"
    listed = json.loads((tmp_path / "out" / "bad_rows.jsonl").read_text())
    assert (listed["source"], listed["line"]) == ("chats.jsonl", 11)


def test_too_many_bad_rows_stop_a_run_before_its_models_are_loaded(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("kvfuse.training.run.new_pair", None)
    (tmp_path / "chats.jsonl").write_text('{"prompt": "q", "response": "a"}\n' * 3 + "{")
    with pytest.raises(RecipeError, match=r"got 25.0% \(examples: 3; bad: 1 broken JSON"):
        train(load_recipe(recipe), lambda line: None)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["bad_rows.jsonl"]


def test_the_same_recipe_twice_gives_the_same_weights(recipe, tmp_path):
    """With dropout and gate noise; bit for bit."""
    for name in ("one", "two"):
        torch.manual_seed(len(name) + ord(name[0]))  # what a program has drawn before changes nothing
        train(load_recipe(recipe, [f"output={tmp_path / name}"]), lambda line: None, quiet=True)
    one, two = (load_file(tmp_path / name / "fuser/model.safetensors") for name in ("one", "two"))
    assert_same_tensors(one, two)


def test_bfloat16_computes_alike_and_leaves_float32_weights(receiver, sharer, encoded, tmp_path):
    """Without dropout, whose masks the two do not draw alike."""

    def losses(bf16):
        pair = fresh_pair(receiver, sharer, dropout=0.0)
        running = trainer(pair, encoded, tmp_path / str(bf16), bf16=bf16)
        seen = []
        pair.fusers[0].projection_out.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        running.args.logging_strategy, running.args.logging_steps = "steps", 1
        running.resume()
        assert set(seen) == {torch.bfloat16 if bf16 else torch.float32}
        assert {parameter.dtype for parameter in pair.fusers[0].parameters()} == {torch.float32}
        saved = load_file(tmp_path / str(bf16) / "checkpoint-6/model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
        return [entry["loss"] for entry in running.state.log_history if "loss" in entry]

    exact, rounded = losses(False), losses(True)
    assert len(exact) == 6
    assert rounded == pytest.approx(exact, abs=0.02)
    assert rounded != exact


def test_the_log_tells_how_many_tokens_a_second(receiver, sharer, encoded, tmp_path):
    running = trainer(fresh_pair(receiver, sharer), encoded, tmp_path, accumulation=1, batch_size=8, steps=2)
    running.args.logging_strategy, running.args.logging_steps = "steps", 1
    pace = running.resume()
    tokens = sum(
        len(one.prompt.receiver.ids) + len(one.response.ids) + len(one.prompt.sharers[0][0].ids) for one in encoded
    )
    assert (pace.steps, pace.tokens) == (2, 2 * tokens)
    logged = [entry for entry in running.state.log_history if "train_tokens_per_second" in entry]
    assert [entry["num_input_tokens_seen"] for entry in logged] == [tokens, 2 * tokens]


@pytest.mark.slow
def test_events_are_written_for_tensorboard(recipe, tmp_path):
    train(load_recipe(recipe, ["train.report_to=tensorboard"]), lambda line: None)
    assert list((tmp_path / "out/checkpoints").rglob("events.out.tfevents.*"))


def test_the_result_tells_what_its_figures_hang_on(recipe, tmp_path, saved_models, receiver):
    train(load_recipe(recipe), lambda line: None, quiet=True)
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["training"]["steps"] == 2
    assert result["training"]["tokens_per_second"] == pytest.approx(
        result["training"]["tokens"] / result["training"]["seconds"]
    )
    assert (result["processes"], result["data"]["examples"], result["data"]["bad"]) == (1, 10, 0)
    described = result["models"]["receiver"]
    assert (described["name"], described["revision"]) == (str(saved_models / "receiver"), None)
    assert (described["tokenizer"], described["dtype"]) == (receiver.identity.tokenizer, "float32")
    assert set(result["versions"]) == {"kvfuse", "torch", "transformers", "accelerate"}


def test_the_fingerprint_is_the_datas(recipe, tmp_path):
    def fingerprint(*words):
        return prepare_data(load_recipe(recipe, words), lambda line: None, quiet=True).fingerprint

    first = fingerprint()
    assert re.fullmatch("[0-9a-f]+", first)
    assert fingerprint("train.steps=9") == first
    assert fingerprint("data.limit=9") != first
    assert fingerprint("data.streaming=true") is None
    (tmp_path / "chats.jsonl").write_text((tmp_path / "chats.jsonl").read_text().replace("number 3", "number 4"))
    assert fingerprint() != first
