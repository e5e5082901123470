"""Made-up questions in the format of every data set, for smoke runs and tests."""

import json
from collections.abc import Sequence
from pathlib import Path

from kvfuse.evaluation.tasks.items import Row

LABELLED = {"text": ["ice", "steam", "fog"], "label": ["A", "B", "C"]}
REDUX = {
    "subject": "law",
    "question": "Which?",
    "choices": list("wxyz"),
    "answer": 1,
    "error_type": "ok",
    "correct_answer": None,
}
GPQA = {"Question": "Which?", "Correct Answer": "right ", **{f"Incorrect Answer {n}": f"wrong {n}" for n in (1, 2, 3)}}
LONG = {"context": "Once.", "input": "Who?", "answers": ["Ada"], "length": 4000, "all_classes": None, "_id": "1"}
ROWS: dict[str, Row] = {
    "mmlu-redux": REDUX,
    "openbookqa": {"question_stem": "Water is", "choices": LABELLED, "answerKey": "B"},
    "arc-challenge": {"question": "Water is", "choices": LABELLED, "answerKey": "C"},
    "arc-easy": {"question": "Water is", "choices": LABELLED, "answerKey": "A"},
    "piqa": {"goal": "Boil water", "sol1": "Heat it.", "sol2": "Cool it.", "label": 0},
    "hellaswag": {"activity_label": "Tea", "ctx": "She boils", "endings": ["water.", "stones.", "air."], "label": "0"},
    "boolq": {"question": "is water wet", "passage": "Water wets.", "answer": True},
    "ceval": {"question": "水是", "A": "冰", "B": "汽", "C": "雾", "D": "石", "answer": "D"},
    "mmmlu": {"Question": "Wasser ist", "A": "Eis", "B": "Dampf", "C": "Nebel", "D": "Stein", "Answer": "A"},
    "mmlu-pro": {"question": "Which?", "options": [f"option {n}" for n in range(10)], "answer": "J", "category": "law"},
    "gpqa-diamond": GPQA,
    "gsm8k": {"question": "1 + 1?", "answer": "One and one.\n#### 1,002"},
    "math-500": {"problem": "$1/2$?", "answer": "\\frac{1}{2}", "subject": "Algebra"},
    "longbench": LONG,
}
"""By data set, see :data:`kvfuse.evaluation.tasks.sources.SOURCES`."""
QUESTIONS = ("goal", "ctx", "question", "question_stem", "Question", "problem", "input")
LENGTHS = (3999, 4000, 8000)


def write(folder: Path, source: str, subjects: Sequence[str] = (), count: int = 3) -> None:
    """Write questions that differ in a number, as files that tasks read with ``data_dir``.

    Args:
        folder: Of all data sets.
        source: A key of :data:`ROWS`.
        subjects: One file each; by default a single file.
        count: Number of questions per file; LongBench's are of all three kinds of length in turn.
    """
    # numbered questions are different items for the bootstrap, and different prompts for the cache
    field = next(name for name in QUESTIONS if name in ROWS[source])
    for subject in subjects or ["questions"]:
        file = folder / source / f"{subject}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**ROWS[source], field: f"{ROWS[source][field]} ({number})"} for number in range(count)]
        if source == "longbench":
            rows = [{**row, "dataset": subject, "length": LENGTHS[number % 3]} for number, row in enumerate(rows)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
