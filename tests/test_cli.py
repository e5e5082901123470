import os
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
import tqdm
from typer.main import get_command
from typer.testing import CliRunner

from kvfuse.checkpoint import save_fuser
from kvfuse.cli import app, main
from kvfuse.errors import KVFuseError
from kvfuse.evaluation.describe_methods import DESCRIPTIONS
from kvfuse.language_model import LanguageModel
from kvfuse.methods import METHODS
from kvfuse.model import CacheToCache
from kvfuse.testing import tiny_fuser

BUILT_IN = list(METHODS)  # before tests register others


@pytest.fixture(scope="module")
def folders(saved_models, tmp_path_factory):
    receiver, sharer = (LanguageModel.from_pretrained(saved_models / name) for name in ("receiver", "sharer"))
    fuser = save_fuser(tiny_fuser(receiver, sharer), tmp_path_factory.mktemp("fusers") / "fuser")
    return {"-r": str(saved_models / "receiver"), "-s": str(saved_models / "sharer"), "-f": str(fuser)}


def commands(group, *path):
    for name, command in getattr(group, "commands", {}).items():
        yield " ".join((*path, name)), command
        yield from commands(command, *path, name)


COMMANDS = dict(commands(get_command(app)))


def words(options):
    return [word for option in options.items() for word in option]


def run(*arguments, text=""):
    return CliRunner().invoke(app, list(arguments), input=text, catch_exceptions=False)


@pytest.fixture
def fails(monkeypatch, capsys):
    """Run the command as a shell would and give back the one line it fails with."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["kvfuse", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return call


def test_help_names_every_command():
    shown = run("--help").output
    assert {"chat", "train", "eval", "report", "align", "analyze", "doctor", "convert", "quantize"} <= COMMANDS.keys()
    assert all(re.search(rf"^  {name} ", shown, re.MULTILINE) for name in COMMANDS if " " not in name)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example(name):
    """Groups and lists take no arguments."""
    lines = [line.strip() for line in COMMANDS[name].help.splitlines() if line.strip()]
    assert lines[-1].startswith(f"kvfuse {name} ") or name in ("data", "list") or name.startswith("list ")


def test_version():
    assert run("--version").output == "kvfuse 0.1.0\n"


def test_chat_answers_one_question(folders):
    result = run("chat", *words(folders), "--max-new-tokens", "4", "What is Oslo?")
    assert result.exit_code == 0
    pair = CacheToCache.from_pretrained(receiver=folders["-r"], sharer=folders["-s"], fuser=folders["-f"])
    assert result.stdout.strip() == pair.chat("What is Oslo?", max_new_tokens=4).strip()


def test_chat_finds_the_models_that_the_fuser_names(folders):
    named = run("chat", *words(folders), "--max-new-tokens", "4", "What is Oslo?").stdout
    assert run("chat", "-f", folders["-f"], "--max-new-tokens", "4", "What is Oslo?").stdout == named
    twice = ["-f", folders["-f"], "-s", folders["-s"]] * 2
    assert run("chat", *twice, "--fusion", "sequential", "--max-new-tokens", "4", "What is Oslo?").exit_code == 0


def test_chat_goes_on_until_an_empty_line(folders):
    result = run("chat", *words(folders), "--max-new-tokens", "2", text="one\ntwo\n\n")
    assert result.exit_code == 0
    assert result.output.count("you:") == 3


def test_chat_ends_quietly_with_the_input(folders):
    result = run("chat", *words(folders), "--max-new-tokens", "2", text="one\ntwo")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "you: "
    assert not result.stdout.endswith("\n\n")


def test_a_question_that_cannot_be_read_does_not_end_the_conversation(folders):
    result = run("chat", *words(folders), "--max-new-tokens", "2", text="word " * 400 + "\nfour\n")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[-1].startswith("error: expected a prompt of at most 256 tokens")
    assert result.stdout.count("you:") == 3


def test_options_of_a_chat_reach_models_and_sampling(folders):
    options = ["--max-new-tokens", "8", "--dtype", "bfloat16", "--device", "cpu", "hello"]
    ask = partial(run, "chat", *words(folders), "--temperature", "5", *options)
    one, same, other = ask("--seed", "1").stdout, ask("--seed", "1").stdout, ask("--seed", "2").stdout
    assert one == same != other


def test_align_prints_two_columns(folders):
    shown = run("align", "What is Oslo?", "-r", folders["-r"], "-s", folders["-s"]).output.splitlines()
    assert shown[0].split() == ["receiver", "sharer"]
    assert shown[-1].startswith("span: ")
    assert (
        run("align", "Oslo", "-r", folders["-r"], "-s", folders["-r"]).output.splitlines()[-1].startswith("identity: ")
    )


def test_align_draws_a_chat(folders, tmp_path):
    (tmp_path / "chat.json").write_text('[{"role": "user", "content": "What is Oslo?"}]', encoding="utf-8-sig")
    files = ["--chat", str(tmp_path / "chat.json"), "--html", str(tmp_path / "out" / "picture.html")]
    result = run(
        "align", *files, "-r", folders["-r"], "-s", folders["-s"], "--how", "reencode-longest", "--fuse", "messages"
    )
    assert result.output.startswith("reencode-longest: ")
    assert len(result.output.splitlines()) == 1
    assert result.output.strip() in (tmp_path / "out" / "picture.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hi", "--how", "spam"], "identity, span, reencode-first, reencode-longest, got 'spam'"),
        (["hi", "--fuse", "spam"], "all, messages, got 'spam'"),
        (["hi", "-s", "{empty}"], "expected a tokenizer at"),
        (["--chat", "{empty}/chat.json"], "expected a chat in JSON"),
        (["hi", "--chat", "{empty}/chat.json"], "got both"),
        ([], "got neither"),
        ([""], "got an empty one"),
    ],
)
def test_wrong_alignments_give_one_line_and_no_file(folders, fails, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    arguments = [argument.format(empty=tmp_path / "empty") for argument in arguments]
    models = ["-r", folders["-r"], "-s", folders["-s"], "--html", str(tmp_path / "picture.html")]
    assert message in fails("align", *models, *arguments)
    assert not (tmp_path / "picture.html").exists()


def test_quantize_prints_one_line_with_both_sizes(folders, tmp_path):
    shown = run("quantize", folders["-f"], str(tmp_path / "small"), "--weights", "int4").stdout
    assert re.fullmatch(rf"wrote {tmp_path}/small: 0\.\d\d MB of float32 -> 0\.\d\d MB of int4 \(\d+%\)\n", shown)
    assert (
        run(
            "chat", *words({**folders, "-f": str(tmp_path / "small")}), "--max-new-tokens", "2", "What is Oslo?"
        ).exit_code
        == 0
    )


@pytest.mark.parametrize(
    ("fuser", "weights", "message"),
    [
        ("-f", "int2", "one of int8, int4, got 'int2'"),
        ("-r", "int8", "got a model of type 'qwen3'"),
        (None, "int8", "no such folder"),
    ],
)
def test_wrong_quantisations_give_one_line_and_no_folder(folders, fails, tmp_path, fuser, weights, message):
    assert message in fails(
        "quantize", folders.get(fuser, "no/such/fuser"), str(tmp_path / "small"), "--weights", weights
    )
    assert not list(tmp_path.iterdir())


def test_quantize_keeps_a_model_with_notes_and_replaces_a_fuser_where_asked(folders, fails, tmp_path):
    shutil.copytree(folders["-r"], tmp_path / "model")
    (tmp_path / "model" / "notes.md").write_text("mine")
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert "new or hold a fuser" in fails("quantize", folders["-f"], f"{tmp_path}/model", "--overwrite")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before
    shutil.copytree(folders["-f"], tmp_path / "fuser")
    assert "--overwrite" in fails("quantize", folders["-f"], f"{tmp_path}/fuser")
    assert run("quantize", folders["-f"], f"{tmp_path}/fuser", "--overwrite").exit_code == 0


@pytest.mark.parametrize("name", ["checkpoints/checkpoint-7/model.bin", "fuser/notes.md"])
def test_train_keeps_a_folder_of_another_program(folders, fails, tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("mine")
    (tmp_path / "recipe").write_text(f"{{receiver: {folders['-r']}, sharer: {folders['-s']}, data: {{path: d.jsonl}}}}")
    assert "of something else in it; choose another output" in fails(
        "train", f"{tmp_path}/recipe", f"output={tmp_path}"
    )
    assert "got the file" in fails("train", f"{tmp_path}/recipe", f"output={tmp_path}/recipe")
    assert (tmp_path / name).read_text() == "mine"


def test_train_runs_a_recipe(folders, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4)
    (tmp_path / "recipe.yaml").write_text(
        f"{{receiver: {folders['-r']}, sharer: {folders['-s']}, data: {{path: {tmp_path}/data.jsonl}}}}"
    )
    result = run("train", f"{tmp_path}/recipe.yaml", f"output={tmp_path}/out", "train.steps=1", "fuser.hidden_dim=8")
    assert result.exit_code == 0
    assert "bits per character" in result.output
    assert (tmp_path / "out" / "fuser" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"-r": "no/such/model"}, "expected a causal language model"),
        ({"-f": "no/such/fuser"}, "got no such folder"),
        ({"-f": "{-r}"}, "got a model of type 'qwen3'"),
        ({"-s": "{-r}"}, "expected a sharer with 4 layers"),
    ],
)
def test_wrong_folders_give_one_line(folders, fails, changed, message):
    options = {**folders, **{key: value.format(**folders) for key, value in changed.items()}}
    assert message in fails("chat", *words(options), "hello")


@pytest.mark.parametrize(
    ("prompt", "message"), [("", "got an empty one"), ("  ", "got an empty one"), ("word " * 400, "at most 256 tokens")]
)
def test_wrong_prompts_give_one_line(folders, fails, prompt, message):
    assert message in fails("chat", *words(folders), prompt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "0", "hello"], "expected max_new_tokens to be a whole number of at least 1, got 0"),
        (["--max-new-tokens", "-3", "hello"], "at least 1, got -3"),
        (["--temperature", "-1", "hello"], "expected a temperature of at least 0, got -1"),
        (["--seed", "-1", "hello"], "expected a seed from 0"),
        (["--device", "spam", "hello"], "expected a device of this machine"),
        (["--device", "meta", "hello"], "expected a device of this machine"),
        (["caf\udce9"], r"the lone surrogate '\udce9'"),  # as Python passes a byte that is not UTF-8
    ],
)
def test_what_cannot_be_answered_gives_one_line(folders, fails, arguments, message):
    assert message in fails("chat", *words(folders), *arguments)


def test_a_pickle_gives_one_line(folders, fails, tmp_path):
    torch.save({"anything": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert "never opened" in fails("chat", *words({**folders, "-f": str(tmp_path)}), "hello")


def test_a_truncated_model_gives_one_line(folders, fails, tmp_path):
    shutil.copytree(folders["-s"], tmp_path / "sharer")
    weights = tmp_path / "sharer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert "expected a causal language model" in fails(
        "chat", *words({**folders, "-s": str(tmp_path / "sharer")}), "hello"
    )


def test_a_wrong_recipe_gives_one_line(fails, tmp_path):
    (tmp_path / "recipe.yaml").write_text("receiver: a\nsharer: b\noutput: c\ndata: {path: d}\n")
    assert "did you mean 'steps'?" in fails("train", f"{tmp_path}/recipe.yaml", "train.stps=3")


def test_an_error_stands_on_a_line_of_its_own(monkeypatch, capsys):
    """A progress bar that an error has left open ends its line first."""

    def fail():
        fail.bar = tqdm.tqdm(total=2)
        raise KVFuseError("expected this")

    monkeypatch.setattr("kvfuse.cli.app", fail)
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.endswith("\nerror: expected this\n")


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left"), 2)])
def test_what_is_no_fault_of_kvfuse_gives_no_traceback(monkeypatch, error, status):
    def fail():
        raise error

    monkeypatch.setattr("kvfuse.cli.app", fail)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == status


@pytest.mark.parametrize(
    "command", [("analyze", "gates", "--smoke", "--out"), ("demo", "--limit", "4", "--json"), ("quantize", "{-f}")]
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(folders, fails, tmp_path, monkeypatch, command):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("kvfuse.model.CacheToCache.read", None)  # nothing is answered
    command = [word.format(**folders) for word in command]
    assert f"can be used, got {tmp_path}/file" in fails(*command, f"{tmp_path}/file/inside/out")


def test_lists_load_no_heavy_library():
    names = ("torch", "transformers", "datasets", "lm_eval")
    lists = ["analyses", "methods", "tasks", "pairs"]
    check = (
        f"import sys; from typer.testing import CliRunner; from kvfuse.cli import app\n"
        f"print([CliRunner().invoke(app, ['list', name]).exit_code for name in {lists}])\n"
        f"print([name for name in {names} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["[0, 0, 0, 0]", "[]"]


def test_every_method_is_listed():
    assert list(DESCRIPTIONS) == BUILT_IN
    assert [line.split()[0] for line in run("list", "methods").output.splitlines()] == BUILT_IN


def test_progress_bars_are_for_terminals(monkeypatch):
    """Read by huggingface_hub, transformers and tqdm when they are imported, which commands do after this."""
    names = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    run("list", "pairs")
    assert [os.environ.get(name) for name in names] == ["1", "1"]
