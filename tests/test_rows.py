"""One reader for all data files: every row once, with its line."""

import gzip
import json

import pytest
from datasets import Dataset

from kvfuse.support.rows import csv_delimiter, decode, read_rows

ROWS = [{"question": f"q{i}", "answer": "é"} for i in range(3)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def read(file):
    return [(line, decode(file.name, content)) for line, content in read_rows(file)]


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("rows.jsonl", LINES, [1, 2, 3]),
        ("rows.json", LINES.replace("\n", "\r\n\r\n"), [1, 3, 5]),
        ("list.json", json.dumps(ROWS), [1, 1, 1]),
        ("pretty.json", json.dumps(ROWS, indent=2), [2, 6, 10]),
        ("rows.jsonl", "\n" + LINES, [2, 3, 4]),
        ("list.json", "\r\n" + json.dumps(ROWS, indent=2).replace("\n", "\r\n"), [3, 7, 11]),
        ("rows.csv", "question,answer\nq0,é\nq1,é\nq2,é\n", [2, 3, 4]),
        ("rows.csv", "question;answer\r\nq0;é\r\nq1;é\r\nq2;é\r\n", [2, 3, 4]),
        ("rows.csv", "question\tanswer\nq0\té\nq1\té\nq2\té\n", [2, 3, 4]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_row_is_read_with_its_line(tmp_path, name, text, lines, encoding, suffix):
    file, content = tmp_path / f"{name}{suffix}", text.encode(encoding)
    file.write_bytes(gzip.compress(content) if suffix else content)
    assert read(file) == list(zip(lines, ROWS, strict=True))


@pytest.mark.parametrize(
    ("header", "delimiter"),
    [("a,b", ","), ("a", ","), ("a;b", ";"), ('"a, b, c";d', ";"), ("a\tb\tc", "\t"), ("", ",")],
)
def test_the_delimiter_is_judged_by_the_header(tmp_path, header, delimiter):
    (tmp_path / "rows.csv").write_text(f"{header}\r\n1;2;3;4\n")
    assert csv_delimiter(tmp_path / "rows.csv") == delimiter


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
def test_another_encoding_is_named(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(LINES.encode(encoding))
    with pytest.raises(ValueError, match=r"UTF-16 text .* save it as UTF-8"):
        read(tmp_path / name)


@pytest.mark.parametrize("kept", [5, 40, -4])
def test_a_broken_archive_is_refused(tmp_path, kept):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:kept])
    with pytest.raises(ValueError, match="broken gzip"):
        read(tmp_path / "rows.jsonl.gz")


def test_text_under_the_name_of_an_archive_is_refused(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_text(LINES)
    with pytest.raises(ValueError, match="broken gzip: Not a gzipped file"):
        read(tmp_path / "rows.jsonl.gz")


def test_parquet_is_read(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == list(zip([1, 2, 3], ROWS, strict=True))


def test_a_quoted_line_break_in_a_table_does_not_end_a_row(tmp_path):
    (tmp_path / "rows.csv").write_text('question,answer\n"one\ntwo",a\n')
    assert read(tmp_path / "rows.csv") == [(3, {"question": "one\ntwo", "answer": "a"})]


def test_a_text_file_is_cut_into_documents(tmp_path):
    (tmp_path / "text.txt").write_text("one<|endoftext|>\n\ntwo<|endoftext|>\n")
    assert read(tmp_path / "text.txt") == [(1, {"text": "one"}), (1, {"text": "\n\ntwo"})]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 7"),
        (b'{"a": ', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b"[1]", "unknown shape: a list"),
        (b"3", "a int"),
    ],
)
def test_bytes_that_are_no_row_say_so(content, kind):
    with pytest.raises(ValueError, match=kind):
        decode("rows.jsonl", content)


@pytest.mark.parametrize("text", ["[", "[{} {", '[{"a": 1},', '[{"a": 1}'])
def test_a_list_without_its_end_is_refused(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=r"broken JSON list in rows.json: .* line 1"):
        read(tmp_path / "rows.json")


@pytest.mark.parametrize(("suffix", "text"), [("csv", "a\n" + "x" * 200_000), ("parquet", "no table")])
def test_a_broken_table_is_refused(tmp_path, suffix, text):
    (tmp_path / f"rows.{suffix}").write_text(text)
    with pytest.raises(ValueError, match=r"broken CSV: field larger|Parquet"):
        read(tmp_path / f"rows.{suffix}")
