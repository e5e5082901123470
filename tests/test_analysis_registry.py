"""Every analysis runs on tiny models of two families, and says what it found in figures, words and a picture."""

import importlib
import json
import struct

import pytest
from typer.testing import CliRunner

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.registry import ANALYSES, analyze, module_of, parse_options, question
from kvfuse.analysis.study import Study
from kvfuse.cli import app
from kvfuse.errors import AnalysisError
from kvfuse.support.plots import new_axes


@pytest.fixture(scope="module")
def study():
    return Study.tiny()


def width(png):
    return struct.unpack(">I", png.read_bytes()[16:20])[0]


@pytest.mark.parametrize("name", ANALYSES)
def test_it_runs_and_is_saved(name, study, tmp_path):
    finding = analyze(name, study)
    files = finding.save(tmp_path, name)
    told = json.loads(files[0].read_text())
    assert told["analysis"] == name
    assert told["reading"] == finding.reading
    assert finding.reading.endswith(".")
    assert told.keys() >= finding.figures.keys()
    assert [file.name for file in files[1:]] == [f"{name}.png", f"{name}.svg"]
    assert width(files[1]) >= 800
    assert "<text" in files[2].read_text()  # words, not outlines
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.name for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("name", ANALYSES)
def test_it_runs_on_another_family(name):
    figures = analyze(name, Study.tiny("gpt2")).figures
    assert json.loads(json.dumps(figures, allow_nan=False)).keys() == figures.keys() != set()


@pytest.mark.parametrize("name", ANALYSES)
def test_its_file_opens_with_a_question(name):
    assert "?" in question(name)
    assert question(name) == importlib.import_module(module_of(name)).__doc__.splitlines()[0]


def test_a_finding_without_a_picture_is_figures_alone(tmp_path):
    assert [file.name for file in Finding({"a": 1}, "Nothing.").save(tmp_path, "x")] == ["x.json"]


def test_pictures_are_the_same_each_time(tmp_path):
    finding = Finding({}, "Nothing.", lambda: new_axes(2.0)[0])
    one, other = (finding.save(tmp_path / name, "x") for name in ("one", "other"))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]


def test_no_figure_is_not_a_number(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Finding({"a": float("nan")}, "Nothing.").save(tmp_path, "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gate", {}, "did you mean 'gates'"),
        ("proportion", {"share": 1}, "did you mean 'shares'"),
        ("gates", {"share": 1}, "it has none"),
    ],
)
def test_unknown_names_and_options_are_told(name, options, message, study):
    with pytest.raises(AnalysisError, match=message):
        analyze(name, study, **options)


def test_options_are_read_as_yaml():
    assert parse_options(["shares=[0.5]", "task=mmlu"]) == {"shares": [0.5], "task": "mmlu"}


def test_the_command_tells_and_writes(tmp_path):
    result = CliRunner().invoke(
        app, ["analyze", "proportion", "shares=[0.5]", "--smoke", "--out", str(tmp_path)], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "With nothing fused" in result.output
    assert json.loads((tmp_path / "proportion.json").read_text())["shares"] == [0, 0.5, 1]


def test_the_command_lists_all():
    result = CliRunner().invoke(app, ["list", "analyses"], catch_exceptions=False)
    assert [line.split()[0] for line in result.output.splitlines()] == list(ANALYSES)
