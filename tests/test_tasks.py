"""Tasks: the published counts on the real files, all options in the prompt, right answers distinguished from wrong."""

import csv
import gzip
import json
import string

import datasets
import pytest

pytest.importorskip("lm_eval")
from lm_eval import evaluate

from kvfuse.errors import EvaluationError
from kvfuse.evaluation.harness.adapter import HarnessModel
from kvfuse.evaluation.harness.requests import cut
from kvfuse.evaluation.tasks import load_task, made_up, task_manager, task_names
from kvfuse.evaluation.tasks.longbench import (
    FAMILIES,
    SCORERS,
    class_share,
    code_similarity,
    family_of,
    number_share,
    rouge_l,
    score,
    word_f1,
)
from kvfuse.evaluation.tasks.made_up import GPQA, REDUX
from kvfuse.evaluation.tasks.readouts import NO_SCORE, likeliest, likeliest_text
from kvfuse.evaluation.tasks.sources import SOURCES
from kvfuse.methods import Method
from kvfuse.methods.base import OptionScore, Reply
from kvfuse.training.data.shapes import to_messages

pytestmark = pytest.mark.usefixtures("quiet_logs")
COUNTS = {"mmlu_redux": 5632, "openbookqa": 500, "arc_challenge": 1150, "ceval": 1346, "gsm8k": 1319}
ROWS = {name.replace("-", "_"): row for name, row in made_up.ROWS.items()}
CHOICES = [name for name in ROWS if f"{name}_options" in task_names()]
CLOZE = [name for name in ROWS if f"{name}_cloze" in task_names()]


class Told(Method):
    """Replies what it is told."""

    name = "told"

    def __init__(self, reply):
        self.told = reply

    def reply(self, prompts, **options):
        return [Reply(self.told, 1, 1) for _ in prompts]

    def score(self, prompts, options):
        return [[OptionScore(-1.0 if self.told == option else -2.0, False, 1) for option in some] for some in options]


def write(folder, rows, name="questions.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def accuracy(task, reply, metric="acc"):
    results = evaluate(HarnessModel(Told(reply), progress=False), task_manager().load([task]), bootstrap_iters=0)
    return {key.split(",")[0]: value for key, value in next(iter(results["results"].values())).items()}[metric]


@pytest.mark.parametrize("name", COUNTS)
def test_as_many_questions_as_published(shared, name):
    task = load_task(f"{name}_generate", shared / "data")
    assert len(task.eval_docs) == COUNTS[name]
    for doc in task.eval_docs:
        prompt = task.doc_to_text(doc)
        assert doc["question"] in prompt
        assert all(
            f"\n{letter}. {text}\n" in prompt
            for letter, text in zip(doc.get("letters", ""), doc.get("choices", ()), strict=True)
        )


@pytest.mark.parametrize("name", CHOICES)
def test_options_are_asked_and_read_in_both_ways(tmp_path, name):
    write(tmp_path, [ROWS[name]])
    written, scored = (load_task(f"{name}_{readout}", tmp_path) for readout in ("generate", "options"))
    doc = written.eval_docs[0]
    letters = string.ascii_uppercase[: len(doc["choices"])]
    for letter in letters:
        right = letter == letters[doc["answer"]]
        assert accuracy(written, f"The correct answer is {letter}.") == right
        assert accuracy(scored, f"\nThe correct answer is {letter}") == right
    assert accuracy(written, "No idea.", "answered") == 0
    assert written.doc_to_text(doc) == scored.doc_to_text(doc)


@pytest.mark.parametrize("name", CLOZE)
def test_the_texts_of_options_are_compared(tmp_path, name):
    task = load_task(f"{name}_cloze", write(tmp_path, [ROWS[name]]))
    doc = task.eval_docs[0]
    for index, text in enumerate(doc["choices"]):
        assert accuracy(task, f" {text}") == accuracy(task, f" {text}", "acc_sum") == (index == doc["answer"])
    assert doc["question"] in task.doc_to_text(doc)


def test_a_cloze_is_read_by_characters_and_by_sums():
    doc = {"choices": ["a", "a long text"], "answer": 1}
    graded = likeliest_text(doc, [(-1.0, False), (-2.0, False)])
    assert graded == {"acc": 1.0, "acc_sum": 0.0, "answered": 1.0}
    assert likeliest_text(doc, [(NO_SCORE, False), (NO_SCORE, False)]) == {"acc": 0, "acc_sum": 0, "answered": 0}


@pytest.mark.parametrize(("name", "count"), [("arc_easy", 2376), ("hellaswag", 2000), ("boolq", 3270)])
def test_real_files_are_read_whole(shared, name, count):
    assert len(load_task(f"{name}_cloze", shared / "data").eval_docs) == count


def test_questions_are_asked_as_in_training(tmp_path):
    row = {"question": "Water is", "choices": ["ice", "steam"], "answer": 1}
    redux = {**REDUX, **row}
    task = load_task("mmlu_redux_generate", write(tmp_path, [redux]))
    request, response = to_messages(row)
    assert task.doc_to_text(task.eval_docs[0]) == request["content"]
    assert task.doc_to_target(task.eval_docs[0]) == response["content"]


def test_gpqa_hides_the_right_answer(tmp_path):
    docs = load_task(
        "gpqa_diamond_generate", write(tmp_path, [{**GPQA, "Question": f"Which {n}?"} for n in range(20)])
    ).eval_docs
    assert {doc["choices"][doc["answer"]] for doc in docs} == {"right"}
    assert {doc["answer"] for doc in docs} == {0, 1, 2, 3}


def test_errors_in_mmlu_redux_are_left_out_or_corrected(tmp_path):
    rows = [
        {**REDUX, "error_type": "no_correct_answer"},
        {**REDUX, "error_type": "expert"},
        {**REDUX, "question": " "},
        {**REDUX, "error_type": "wrong_groundtruth", "correct_answer": "D"},
        {**REDUX, "error_type": "wrong_groundtruth", "correct_answer": "0"},
        {**REDUX, "error_type": "wrong_groundtruth", "correct_answer": None},
        {**REDUX, "error_type": "bad_question_clarity", "correct_answer": "0"},
    ]
    assert load_task("mmlu_redux_generate", write(tmp_path, rows)).eval_docs["answer"] == [3, 0, 1, 1]


@pytest.mark.parametrize(
    ("source", "reply", "right"),
    [
        ("gsm8k", "So\nAnswer: $1002", 1),
        ("gsm8k", "1003", 0),
        ("math-500", "Answer: $0.5$", 1),
        ("math-500", "\\boxed{2}", 0),
        ("gsm8k", "", 0),
    ],
)
def test_results_are_compared(tmp_path, source, reply, right):
    assert (
        accuracy(load_task(f"{source.replace('-', '')}_generate", write(tmp_path, [made_up.ROWS[source]])), reply)
        == right
    )


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it"), ValueError("no such config")])
def test_data_that_the_hub_does_not_give_are_one_line(monkeypatch, error):
    def load_dataset(*names, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(EvaluationError, match=rf"allenai/openbookqa on the Hub, got: {error}; .*--data DIR"):
        load_task("openbookqa_generate")


def test_the_embedded_facts_are_asked_by_kind():
    task = load_task("embedded_generate", only="compound", limit=8)
    assert set(task.eval_docs["kind"]) == {"compound"}
    doc = task.eval_docs[0]
    assert task.doc_to_text(doc) == doc["question"]
    assert accuracy(task, doc["answer"]) >= 1 / len(task.eval_docs)
    assert len(load_task("embedded_generate").eval_docs) >= 500


def test_longbench_has_its_data_sets_and_lengths(tmp_path):
    names = [
        one.task_name.split("::")[1] for one in task_manager_group("longbench_e_generate", tmp_path).get_all_tasks()
    ]
    assert len(names) == 13
    assert all(family_of(name) for name in names)
    assert sorted(" ".join(FAMILIES.values()).split()) == sorted(" ".join(SCORERS.values()).split())
    task = next(
        one
        for one in task_manager_group("longbench_e_generate", tmp_path).get_all_tasks()
        if one.task_name.endswith("::qasper")
    )
    assert task.eval_docs["kind"] == ["0-4k", "4-8k", "8k+"]
    prompt = task.doc_to_text(task.eval_docs[0])
    assert prompt.index("Once.") < prompt.index("Who?")
    assert accuracy(task, "ada", "score") == 1


def task_manager_group(name, folder):
    made_up.write(folder, "longbench", [f"{data_set}_e" for data_set in " ".join(FAMILIES.values()).split()])
    return load_task(name, folder)


def test_every_data_set_has_made_up_questions():
    assert made_up.ROWS.keys() == SOURCES.keys()


def test_answers_can_be_kept_short(tmp_path):
    def longest(**options):
        return load_task(
            "openbookqa_generate", write(tmp_path, [ROWS["openbookqa"]]), **options
        ).config.generation_kwargs["max_gen_toks"]

    assert (longest(), longest(max_new_tokens=8), longest()) == (64, 8, 64)


def test_scores_of_longbench():
    assert word_f1("The red, house!", "a red house") == 1
    assert word_f1("red", "red house") == pytest.approx(2 / 3)
    assert word_f1("我在家", "家") == pytest.approx(0.5)
    assert word_f1("", "house") == 0
    assert rouge_l("the cat sat", "the cat sat") == 1
    assert rouge_l("今天很好", "今天好") == pytest.approx(6 / 7)
    assert class_share("city or state", "city", ["city", "state", "date"]) == 0.5
    assert class_share("other city", "other city", ["city", "other city"]) == 1
    assert class_share("date", "city", ["city", "date"]) == 0
    assert number_share("Paragraph 3 or 4", "Paragraph 3", []) == 0.5
    assert number_share("none", "3", []) == 0
    assert code_similarity("```python\n# x\nreturn 1\nreturn 2", "return 1", []) == 1
    assert score({"data_set": "trec", "family": "examples", "answers": ["a"], "classes": ["a", "b"]}, ["\na\nb"]) == {
        "score": 1
    }


def test_options_that_could_not_be_scored_are_wrong():
    assert likeliest({"answer": 0}, [(NO_SCORE, False)] * 4) == {"acc": 0, "answered": 0}


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet", "jsonl.gz"])
def test_files_are_read_as_they_are_found(tmp_path, suffix):
    rows = [{**ROWS["ceval"], "id": n} for n in range(3)]
    for split in ("dev", "val"):
        path = tmp_path / "ceval" / split / f"law_{split}.{suffix}"
        path.parent.mkdir(parents=True)
        save(path, rows[: 1 if split == "dev" else 3])
    docs = load_task("ceval_options", tmp_path).eval_docs
    assert docs["kind"] == ["law"] * 3
    assert len(load_task("ceval_options", tmp_path, limit=2).eval_docs) == 2


def save(path, rows):
    if path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as opened:
            table = csv.DictWriter(opened, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode("utf-8-sig")))
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))


def test_another_template_takes_the_place_of_the_prompt(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ question }}: {{ choices | join(', ') }}?")
    task = load_task("openbookqa_options", write(tmp_path, [ROWS["openbookqa"]]), template)
    assert task.doc_to_text(task.eval_docs[0]) == "Water is: ice, steam, fog?"
    template.write_bytes("{{ question }}:\r\n?".encode("utf-8-sig"))
    task = load_task("openbookqa_options", tmp_path, template)
    assert task.doc_to_text(task.eval_docs[0]) == "Water is:\n?"
    template.write_bytes("{{ question }}".encode("utf-16"))
    with pytest.raises(EvaluationError, match="UTF-16 text"):
        load_task("openbookqa_options", tmp_path, template)
    template.write_text("{{ question")
    with pytest.raises(EvaluationError, match="expected a Jinja template"):
        load_task("openbookqa_options", tmp_path, template)


def without(row, field):
    return {key: value for key, value in row.items() if key != field}


def broken(tmp_path, rows, **options):
    return lambda: load_task("openbookqa_generate", write(tmp_path, rows), **options)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [ROWS["openbookqa"], without(ROWS["openbookqa"], "answerKey")],
            r"expected the field 'answerKey' in .*questions.jsonl, line 2, got",
        ),
        ([{**ROWS["openbookqa"], "choices": None}], r"expected a question in .*questions.jsonl, line 1"),
        ([{**ROWS["openbookqa"], "answerKey": "E"}], r"line 1, got: 'E' is not in list"),
        ([], "expected questions of openbookqa, got none"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, words):
    with pytest.raises(EvaluationError, match=words):
        load_task("openbookqa_generate", write(tmp_path, rows))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(EvaluationError, match="did you mean 'openbookqa_generate'"):
        load_task("openbook_qa_generate")
    with pytest.raises(EvaluationError, match="expected files of openbookqa, split test"):
        load_task("openbookqa_generate", tmp_path)
    (tmp_path / "questions.jsonl").write_text("{")
    with pytest.raises(EvaluationError, match=r"expected rows in .*questions.jsonl"):
        load_task("openbookqa_generate", tmp_path)
    write(tmp_path, [ROWS["mmlu_pro"]])
    with pytest.raises(EvaluationError, match="got 'laws'; did you mean 'law'"):
        load_task("mmlu_pro_generate", tmp_path, only="laws")


@pytest.mark.parametrize(
    ("name", "row", "run_on"),
    [
        ("openbookqa_generate", "openbookqa", "\nQuestion: What next?\n\nChoices:\nA. one\nThe correct answer is A."),
        ("gsm8k_generate", "gsm8k", "\nAnd in 2 days?\n\nWork this out step by step. Give it.\nAnswer: 3"),
        ("math500_generate", "math-500", "\nAnd y?\n\nWork this out step by step. Give it.\nAnswer: $y$"),
    ],
)
def test_a_question_of_the_models_own_making_is_not_read(tmp_path, name, row, run_on):
    task = load_task(name, write(tmp_path, [made_up.ROWS[row]]))
    marker = task.config.generation_kwargs["until"][0]
    assert marker.strip() in task.doc_to_text(task.eval_docs[0])
    for whole in ("Answer: 5", "Question: 2 + 3?\nAnswer: 5", "<think>\nQuestion: 2 + 3?\nOh.</think>Answer: 5"):
        assert cut(whole, [marker]) == whole
        assert cut(whole + run_on, [marker]) == whole + run_on.split(marker)[0]
