import ast
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from kvfuse.errors import RecipeError
from kvfuse.testing import TEMPLATES, tiny_tokenizer
from kvfuse.training.data import encoding
from kvfuse.training.data.columns import from_columns, to_columns
from kvfuse.training.data.encoding import Encoder, Reader
from kvfuse.training.data.examples import Example
from kvfuse.training.data.prepare import prepare, split
from kvfuse.training.loop.batches import collate
from kvfuse.training.recipe import DataSection, Recipe

disable_progress_bars()
QUESTIONS = [(("user", f"What is {i}?"), ("assistant", f"It is number {i}.")) for i in range(10, 22)]
CHATS = [
    {"messages": [{"role": role, "content": text} for role, text in turns] * (1 + i % 3)}
    for i, turns in enumerate(QUESTIONS)
]
NOT_ENCODING = {  # modules that preparing imports, and why an edit of them changes no encoded row
    "kvfuse.prompts.response_tokens": "reads along what is generated"
}
BAD = {
    "broken JSON": b'{"messages": [',
    "not UTF-8": b'{"prompt": "\xff"}',
    "unknown shape": b'{"story": "x"}',
    "wrong shape": b'{"messages": 3}',
    "wrong roles": b'{"prompt": "only a question"}',
    "empty response": b'{"prompt": "q", "response": " "}',
    "too long": json.dumps({"prompt": "q", "response": "word " * 300}).encode(),
    "refused prompt": b'{"prompt": " ", "response": "a"}',
}


def encoder_of(template="tagged", **options):
    receiver, sharer = (
        Reader("receiver", tiny_tokenizer(template=template), 256),
        Reader("sharer", tiny_tokenizer(300, "lines"), 512),
    )
    return Encoder(receiver, ((sharer, "span"),), **options)


@pytest.fixture
def chats(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text(
        "\n".join(json.dumps({**chat, "id": str(tmp_path)}) for chat in CHATS)
    )  # not yet in the cache of any test
    return file


@pytest.fixture
def calls(monkeypatch):
    """How often a row was encoded."""
    made, encode = Counter(), Encoder.encode

    def counting(self, example):
        made["encoded"] += 1
        return encode(self, example)

    monkeypatch.setattr(Encoder, "encode", counting)
    return made


def columns(prepared):
    return prepared.examples.to_list()


@pytest.mark.parametrize("fuse_response", [False, True])
@pytest.mark.parametrize("alignment", ["identity", "span", "reencode-first"])
def test_columns_give_the_batch_of_the_examples(receiver, sharer, alignment, fuse_response):
    reader = Reader.of(receiver if alignment == "identity" else sharer)
    encoder = Encoder(Reader.of(receiver), ((reader, alignment),), fuse_response=fuse_response)
    prompts = ("What is Oslo?", [{"role": "user", "content": "hi"}], CHATS[2]["messages"])
    encoded = [encoder.encode(Example(prompt, "It is a city.")) for prompt in prompts]
    before, after = collate(encoded), collate([from_columns(to_columns(one)) for one in encoded])
    for name in ("prompt", "tail"):
        expected, got = getattr(before, name), getattr(after, name)
        assert len(expected.sharers) == len(got.sharers) == (1 if name == "prompt" or fuse_response else 0)
        for part, same in zip([expected, *expected.sharers], [got, *got.sharers], strict=True):
            fields = [field for field in vars(part) if field not in ("sharers", "texts")]  # only generation needs texts
            assert all(torch.equal(getattr(part, field), getattr(same, field)) for field in fields)
    assert torch.equal(before.labels, after.labels)


def test_a_recipes_encoder_is_that_of_its_pair(pair, saved_models, tmp_path):
    names = {name: str(saved_models / name) for name in ("receiver", "sharer")}
    recipe = Recipe(
        **names, output=tmp_path, data=DataSection(path="x"), fuser={"fuse": "messages", "fuse_response": True}
    )
    loaded = Encoder.load(recipe)
    assert (loaded.fuse, loaded.fuse_response, loaded.sharers[0][1]) == ("messages", True, "span")
    plain = Encoder.load(recipe.model_copy(update={"fuser": recipe.fuser.model_validate({})}))
    assert plain.fingerprint() == Encoder.of(pair).fingerprint() != loaded.fingerprint()


@pytest.mark.parametrize("module", encoding.ENCODING_MODULES)
def test_an_edit_of_what_encodes_changes_the_fingerprint(module, tmp_path, monkeypatch):
    encoder, source_of = encoder_of(), encoding.source_of
    before, edited = encoder.fingerprint(), tmp_path / "edited.py"
    edited.write_bytes(source_of(module).read_bytes() + b"# another line")
    monkeypatch.setattr(encoding, "source_of", lambda name: edited if name == module else source_of(name))
    assert encoder.fingerprint() != before


def test_the_fingerprint_reads_nothing_but_what_encodes(monkeypatch):
    """So an edit of a picture or of the command line encodes nobody's data again."""
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    encoder_of().fingerprint()
    assert read == [encoding.source_of(name) for name in encoding.ENCODING_MODULES]


def imports_of(module):
    """Modules of ours that a module imports, wherever in it; a name imported from a package may be a module too."""
    for node in ast.walk(ast.parse(encoding.source_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("kvfuse."))
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("kvfuse."):
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (node.module, *(name for name in names if is_module(name)))


def is_module(name):
    return Path(encoding.source_of("kvfuse")).parent.joinpath(*name.split(".")[1:]).with_suffix(".py").exists()


def test_the_fingerprint_covers_every_module_that_encodes():
    reached, unread = set(), {"kvfuse.training.data.prepare"}
    while unread:
        module = unread.pop()
        reached.add(module)
        unread |= set(imports_of(module)) - reached
    encode = {name for name in reached if name.startswith(("kvfuse.prompts.", "kvfuse.training.data."))}
    assert (
        set(encoding.ENCODING_MODULES) == {*encode, "kvfuse.support.files", "kvfuse.support.rows"} - NOT_ENCODING.keys()
    )
    assert encode >= NOT_ENCODING.keys(), "no exception is stale"
    assert "kvfuse.support.rows" in reached


def test_a_module_that_moved_is_not_left_out_of_the_fingerprint(monkeypatch):
    monkeypatch.setattr(encoding, "ENCODING_MODULES", (*encoding.ENCODING_MODULES, "kvfuse.no_such_module"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        encoder_of().fingerprint()


def test_every_kind_of_bad_row_is_counted_and_placed(chats):
    chats.write_bytes(b"\n".join([*BAD.values(), chats.read_bytes()]))
    data = DataSection(path=chats)
    prepared = prepare(data, encoder_of())
    assert [(row.source, row.line, row.reason.partition(":")[0]) for row in prepared.bad] == [
        ("chats.jsonl", line, kind) for line, kind in enumerate(BAD, start=1)
    ]
    assert len(prepared.examples) == len(CHATS)
    assert all(f"1 {kind}" in str(prepared) for kind in BAD)
    assert [json.loads(line)["line"] for line in prepared.bad_rows().splitlines()] == list(range(1, 1 + len(BAD)))
    with pytest.raises(RecipeError, match=r"at most 5.0% bad rows .* got 40.0% .* chats.jsonl line 1: broken JSON"):
        prepared.require_enough(data)
    prepared.require_enough(data.model_copy(update={"max_bad_share": 0.4}))


def test_what_a_template_refuses_is_a_bad_row(chats):
    refusing = (
        TEMPLATES["tagged"] + "{% if messages|length > 3 %}{{ raise_exception('one question at a time') }}{% endif %}"
    )
    encoder = encoder_of()
    encoder.receiver.tokenizer.chat_template = refusing
    prepared = prepare(DataSection(path=chats), encoder)
    assert len(prepared.bad) == 4
    assert all("one question at a time" in row.reason for row in prepared.bad)


def test_too_few_examples_are_refused(chats):
    chats.write_text(json.dumps(CHATS[0]))
    data = DataSection(path=chats)
    with pytest.raises(RecipeError, match="at least 2 examples"):
        prepare(data, encoder_of()).require_enough(data)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "text"), [("none.jsonl", "\n"), ("none.json", "[]"), ("short.txt", "no response"), ("none.txt", "")]
)
def test_a_source_without_examples_is_refused(tmp_path, name, text, streaming):
    (tmp_path / name).write_text(text)
    data = DataSection(path=tmp_path / name, streaming=streaming)
    with pytest.raises(RecipeError, match=r"expected rows or documents|at least 2 examples"):
        prepare(data, encoder_of()).require_enough(data)


def test_every_turn_is_an_example_where_asked(chats):
    last, every = (prepare(DataSection(path=chats, loss_on=which), encoder_of()).examples for which in ("last", "all"))
    assert (len(last), len(every)) == (12, 4 * (1 + 2 + 3))
    assert every["line"][:6] == [1, 2, 2, 3, 3, 3]
    assert [row for row in every.to_list() if row["line"] == 3][-1] == last.to_list()[2]


def test_long_chats_are_bad_or_lose_their_oldest_turns(chats):
    lengths = sorted(set(prepare(DataSection(path=chats), encoder_of()).examples["length"]))
    short = [row for row in columns(prepare(DataSection(path=chats), encoder_of())) if row["line"] % 3 == 1]
    most = max(row["length"] for row in short)
    assert most < lengths[-1]
    encoder = encoder_of(max_tokens=most)
    refused = prepare(DataSection(path=chats, max_tokens=most), encoder)
    assert (len(refused.examples), refused.shortened, {row.reason.partition(":")[0] for row in refused.bad}) == (
        4,
        0,
        {"too long"},
    )
    shorter = prepare(DataSection(path=chats, max_tokens=most, truncation="drop_history"), encoder)
    assert (len(shorter.examples), shorter.shortened, shorter.bad) == (12, 8, ())
    assert "8 without their oldest turns" in str(shorter)
    assert max(shorter.examples["length"]) <= most
    decode = encoder.receiver.tokenizer.decode
    assert "It is" not in decode(shorter.examples[2]["ids"]), "one question is left"
    assert decode(shorter.examples[2]["response"]) == "It is number 12.<|end|>", "and the response is whole"


def test_a_sharer_without_room_counts_too(chats):
    encoder = encoder_of()
    narrow = Encoder(encoder.receiver, ((Reader("narrow", encoder.sharers[0][0].tokenizer, 10), "span"),))
    prepared = prepare(DataSection(path=chats), narrow)
    assert (len(prepared.examples), len(prepared.bad)) == (0, 12)
    assert all("10 tokens of narrow" in row.reason for row in prepared.bad)


def test_a_second_run_reads_what_the_first_has_encoded(chats, calls, monkeypatch):
    first = prepare(DataSection(path=chats), encoder_of())
    assert calls["encoded"] == len(CHATS)
    monkeypatch.setattr(Encoder, "encode", None)  # in worker processes too
    again = prepare(DataSection(path=chats, max_bad_share=0.5, workers=2, validation_share=0.5), encoder_of())
    assert columns(first) == columns(again)


@pytest.mark.parametrize(
    ("encoder", "data"),
    [
        ({"template": "lines"}, {}),
        ({"fuse": "messages"}, {}),
        ({"fuse_response": True}, {}),
        ({"max_tokens": 200}, {}),
        ({}, {"truncation": "drop_history"}),
        ({}, {"limit": 8}),
        ({}, {"format": "messages"}),
    ],
)
def test_anything_else_is_encoded_again(chats, calls, encoder, data):
    prepare(DataSection(path=chats), encoder_of())
    calls.clear()
    prepare(DataSection(path=chats, **data), encoder_of(**encoder))
    assert calls["encoded"] > 0


def test_other_content_of_the_same_length_is_encoded_again(chats, calls):
    prepare(DataSection(path=chats), encoder_of())
    calls.clear()
    chats.write_text(chats.read_text().replace("number", "cipher"))
    assert "cipher" in encoder_of().receiver.tokenizer.decode(
        prepare(DataSection(path=chats), encoder_of()).examples[0]["response"]
    )


@pytest.mark.parametrize(
    "options", [{"streaming": True}, {"workers": 2, "separator": "other"}], ids=["streamed", "two workers"]
)
def test_streamed_and_parallel_rows_are_the_same(chats, options):
    chats.write_bytes(b"\n".join([BAD["broken JSON"], chats.read_bytes()]))
    plain = prepare(DataSection(path=chats), encoder_of())
    same = prepare(DataSection(path=chats, **options), encoder_of())
    assert columns(plain) == columns(same)
    assert plain.bad == same.bad


@pytest.mark.parametrize("streaming", [False, True])
def test_a_list_without_its_end_is_refused(chats, streaming):
    broken = chats.with_suffix(".json")
    broken.write_text("[" + chats.read_text().replace("\n", ",")[:-9])
    with pytest.raises(RecipeError, match="broken JSON list"):
        prepare(DataSection(path=broken, streaming=streaming), encoder_of())


@pytest.mark.parametrize("quiet", [False, True])
def test_a_quiet_run_shows_no_bar(chats, capfd, quiet):
    enable_progress_bars()
    prepare(DataSection(path=chats), encoder_of(), quiet)
    assert ("encoding" in capfd.readouterr().err) is not quiet
    assert not are_progress_bars_disabled()
    disable_progress_bars()


def test_a_limit_is_one_of_rows_and_of_examples(chats):
    assert prepare(DataSection(path=chats, limit=5), encoder_of()).examples["line"][:] == [1, 2, 3, 4, 5]
    assert prepare(DataSection(path=chats, limit=5, loss_on="all"), encoder_of()).examples["line"][:] == [1, 2, 2, 3, 3]


def test_held_out_examples_are_the_last(chats):
    examples = prepare(DataSection(path=chats), encoder_of()).examples
    training, held_out = split(examples, 0.25)
    assert (training["line"][:], held_out["line"][:]) == (list(range(1, 10)), [10, 11, 12])
    assert [len(part) for part in split(examples.select(range(2)), 0.01)] == [1, 1]


@pytest.mark.parametrize(
    ("file", "rows"),
    [("chat/glaive_toolcall_en_demo.json", 300), ("chat/v1_sft_demo.jsonl", 500), ("openbookqa/test.jsonl", 500)],
)
def test_real_files_are_prepared(shared, file, rows):
    prepared = prepare(DataSection(path=shared / "data" / file, limit=60), encoder_of(max_tokens=250))
    assert len(prepared.examples) + len(prepared.bad) == 60 < rows
    assert {row.reason.partition(":")[0] for row in prepared.bad} <= {"too long"}
    for row in prepared.examples:
        index = np.array(row["sharer_index"][0])
        assert len(index) == len(row["ids"]) == len(row["fusable"]) <= 250
        assert (np.diff(index) >= 0).all()
        assert index.max() < len(row["sharer_ids"][0])
