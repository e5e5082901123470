import gc
import gzip
import json
import sys
import warnings

import datasets
import pytest

from kvfuse.errors import RecipeError
from kvfuse.support.rows import decode
from kvfuse.training.data.sources import load_rows, parse
from kvfuse.training.recipe import DataSection

ROWS = [{"prompt": f"q{i}", "response": f"a{i} é\u2028"} for i in range(5)]


def read(path, **options):
    data = DataSection(path=path, **options)
    found = (parse(row, number, data) for number, row in enumerate(load_rows(data)))
    return [(source, line, decode(source, content)) for source, line, content in found]


def write(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def as_lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "first", "step"),
    [
        ("rows.jsonl", as_lines(ROWS), 1, 1),
        ("rows.json", as_lines(ROWS), 1, 1),
        ("spaced.jsonl", "\n" + as_lines(ROWS).replace("\n", "\r\n\r\n"), 2, 2),
        ("list.json", json.dumps(ROWS), 1, 0),
        ("pretty.json", json.dumps(ROWS, indent=2, ensure_ascii=False), 2, 4),
    ],
)
def test_rows_of_json_know_their_lines(tmp_path, name, text, first, step, streaming):
    expected = [(name, first + step * i, row) for i, row in enumerate(ROWS)]
    assert read(write(tmp_path / name, text), streaming=streaming) == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_are_read(tmp_path, suffix, streaming):
    file = tmp_path / f"rows.{suffix}"
    getattr(datasets.Dataset.from_list(ROWS), f"to_{suffix}")(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # datasets leaves the files open that it streams
        assert [row for _, _, row in read(file, streaming=streaming)] == ROWS
        assert [line for _, line, _ in read(file, streaming=streaming, limit=3)] == [1, 2, 3]
        gc.collect()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_tables_are_read_as_other_programs_write_them(tmp_path, delimiter, suffix, streaming):
    text = f"prompt{delimiter}response\r\n" + "".join(f"q{i}{delimiter}é\r\n" for i in range(2))
    content = text.encode("utf-8-sig")
    file = write(tmp_path / f"rows.csv{suffix}", gzip.compress(content) if suffix else content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        rows = [row for _, _, row in read(file, streaming=streaming)]
        gc.collect()
    assert rows == [{"prompt": f"q{i}", "response": "é"} for i in range(2)]


def test_archives_of_lines_are_read(tmp_path):
    write(tmp_path / "a.jsonl.gz", gzip.compress(as_lines(ROWS).encode("utf-8-sig")))
    write(tmp_path / "b.txt.gz", gzip.compress(b"words"))
    assert [(name, row) for name, _, row in read(tmp_path)] == [
        *(("a.jsonl.gz", row) for row in ROWS),
        ("b.txt.gz", {"text": "words"}),
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_another_encoding_is_named(tmp_path, name):
    with pytest.raises(RecipeError, match=r"UTF-16 text .* save it as UTF-8"):
        load_rows(DataSection(path=write(tmp_path / name, as_lines(ROWS).encode("utf-16"))))


def test_tables_with_different_delimiters_are_refused(tmp_path):
    write(tmp_path / "a.csv", "prompt;response\na;b\n")
    write(tmp_path / "b.csv", "prompt,response\na,b\n")
    with pytest.raises(RecipeError, match="CSV files with one delimiter"):
        load_rows(DataSection(path=tmp_path))


def test_documents_know_the_lines_they_begin_at(tmp_path):
    file = write(tmp_path / "d.txt", "one\r\ntwo\n---\n\n---three\n")
    assert read(file, separator="---") == [("d.txt", 1, {"text": "one\ntwo\n"}), ("d.txt", 5, {"text": "three\n"})]


def test_a_file_of_any_name_is_text_where_asked(tmp_path):
    assert read(write(tmp_path / "book.md", "words"), format="text") == [("book.md", 1, {"text": "words"})]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "b.jsonl", as_lines(ROWS[2:]))
    write(tmp_path / "a.json", json.dumps(ROWS[:2]))
    write(tmp_path / "LICENCE", "not read")
    assert [(source, row) for source, _, row in read(tmp_path)] == [
        *(("a.json", row) for row in ROWS[:2]),
        *(("more/b.jsonl", row) for row in ROWS[2:]),
    ]


def test_a_limit_reads_no_further(tmp_path):
    file = write(tmp_path / "rows.json", json.dumps(ROWS)[:-30])
    assert len(read(file, limit=2)) == 2
    with pytest.raises(RecipeError, match="broken JSON list"):
        read(file)


@pytest.mark.parametrize(
    ("name", "text", "message", "streaming"),
    [
        ("rows.json", '[{"a": 1},', "broken JSON list in rows.json", False),
        ("rows.json", '[{"a": 1},', "broken JSON list in rows.json", True),
        ("rows.csv", "a,b\n1,2\n1,2,3", "line 3", False),
    ],
)
def test_a_file_that_is_broken_as_a_whole_is_named(tmp_path, name, text, message, streaming):
    file = write(tmp_path / name, text)
    with pytest.raises(
        RecipeError, match=rf"expected rows at data.path .*{name}, got: .*{message}.*; correct the file"
    ):
        read(file, streaming=streaming)


def test_a_byte_that_is_not_utf8_spoils_its_own_item_alone(tmp_path):
    data = DataSection(path=write(tmp_path / "rows.json", b'[{"a": "1"}, {"a": "\xff"}, {"a": "3"}]'))
    contents = [parse(row, 0, data)[2] for row in load_rows(data)]
    assert contents == [b'{"a": "1"}', b'{"a": "\xff"}', b'{"a": "3"}']


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.jsonl", "which does not exist"),
        ("no/such/place/at/all", "which does not exist"),
        ("someone/some-data", "expected rows at data.path someone/some-data"),
    ],
)
def test_a_source_that_is_not_there_is_named(path, message):
    with pytest.raises(RecipeError, match=message):
        load_rows(DataSection(path=path))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_is_asked_for_by_all_its_names(monkeypatch, streaming):
    asked = []

    def load_dataset(*names, **options):
        asked.append((*names, options))
        rows = datasets.Dataset.from_list(ROWS)
        return rows.to_iterable_dataset() if options["streaming"] else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"name": "main", "split": "test", "revision": "v1", "streaming": streaming}
    assert read("someone/some-data", limit=2, **options) == [
        ("someone/some-data", line, ROWS[line - 1]) for line in (1, 2)
    ]
    assert len(read("someone/some-data", limit=99, **options)) == len(ROWS)
    del options["name"]
    assert asked[0] == ("someone/some-data", "main", options)


@pytest.mark.parametrize("names", [["a.csv", "b.jsonl"], ["a.csv", "b.parquet"], ["a.md"], []])
def test_files_of_other_kinds_or_of_several_are_refused(tmp_path, names):
    for name in names:
        write(tmp_path / name, "x")
    with pytest.raises(RecipeError, match="expected files of one kind"):
        load_rows(DataSection(path=tmp_path))


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecipeError, match=r"pip install 'kvfuse\[train\]'"):
        load_rows(DataSection(path=write(tmp_path / "rows.jsonl", as_lines(ROWS))))
