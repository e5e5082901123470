import json

import pytest
from typer.testing import CliRunner

from kvfuse.cli import app
from kvfuse.errors import RecipeError
from kvfuse.training.data.generate import Sampling, generate
from kvfuse.training.data.shapes import to_messages
from kvfuse.training.recipe import DataSection, load_data

QUICK = Sampling(max_new_tokens=6, batch_size=2)
QUESTIONS = ["What is Oslo?", "Which language?", "Who asks?", "Two models read", "What is Oslo?"]
SAMPLED = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=6, batch_size=2, seed=3)


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": question, "response": "known"} for question in QUESTIONS[:2]] + [
        {"prompt": question} for question in QUESTIONS[2:]
    ]
    (tmp_path / "source.jsonl").write_text(
        "\n".join(map(json.dumps, rows)) + "\nbroken\n" + json.dumps({"prompt": "word " * 300})
    )
    return DataSection(path=tmp_path / "source.jsonl")


def run(data, model, out, sampling=QUICK):
    said = []
    return generate(data, model, out, sampling, said.append), said


def chats(out):
    return [to_messages(json.loads(line)) for line in out.read_text().splitlines()]


def test_every_prompt_gets_the_models_own_response_once(data, receiver, tmp_path):
    added, said = run(data, receiver, tmp_path / "deep" / "out.jsonl")
    written = chats(tmp_path / "deep" / "out.jsonl")
    assert added == 4
    assert [chat[0]["content"] for chat in written] == QUESTIONS[:4]
    assert all(
        [message["role"] for message in chat] == ["user", "assistant"] and chat[1]["content"] != "known"
        for chat in written
    )
    assert "4 prompts" in said[1]
    assert "2 rows have none" in said[1]


@pytest.mark.parametrize("sampling", [QUICK, SAMPLED], ids=["greedy", "sampled"])
def test_a_killed_run_goes_on_where_it_was(data, receiver, tmp_path, sampling):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    run(data, receiver, whole, sampling)
    first_batch = "".join(whole.read_text().splitlines(keepends=True)[:2])
    resumed.write_text(first_batch + '{"messages": [{"role": "us')
    assert run(data, receiver, resumed, sampling)[0] == 2
    assert resumed.read_text() == whole.read_text()
    assert run(data, receiver, resumed, sampling)[0] == 0
    assert resumed.read_text() == whole.read_text()


def test_the_seed_decides_what_is_sampled(data, receiver, tmp_path):
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, (1, 1, 2), strict=True):
        run(data, receiver, out, Sampling(temperature=1.0, max_new_tokens=6, seed=seed))
    same, again, other = (out.read_text() for out in outs)
    assert same == again != other


@pytest.mark.parametrize("content", ["words\n", "words", '{"prompt": "q"}\n'])
def test_another_file_is_not_written_to(data, receiver, tmp_path, content):
    (tmp_path / "notes").write_text(content)
    with pytest.raises(RecipeError, match="expected rows of messages"):
        run(data, receiver, tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == content


def test_a_source_without_prompts_is_refused(receiver, tmp_path):
    (tmp_path / "story.txt").write_text("Once upon a time")
    with pytest.raises(RecipeError, match="expected prompts"):
        run(DataSection(path=tmp_path / "story.txt"), receiver, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_on_the_command_line(data, saved_models, tmp_path):
    words = [
        "data",
        "generate",
        str(data.path),
        "limit=3",
        "--model",
        str(saved_models / "receiver"),
        "--out",
        str(tmp_path / "out.jsonl"),
    ]
    result = CliRunner().invoke(app, [*words, "--max-new-tokens", "4"], catch_exceptions=False)
    assert "added 3 responses" in result.output
    assert len(chats(tmp_path / "out.jsonl")) == 3


def test_a_wrong_word_names_the_nearest_key():
    with pytest.raises(RecipeError, match="did you mean 'limit'"):
        load_data("x.jsonl", ["limt=3"])
