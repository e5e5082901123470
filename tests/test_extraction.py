import pytest

from kvfuse.evaluation.scoring.extraction import extract_option, strip_thoughts

FRUIT = ["Apple", "Pear", "Pear tree", "a plum"]
CASES = [
    ("A", "A"),
    ("b", "B"),
    ("a", "A"),
    ("B.", "B"),
    ("(C)", "C"),
    ("[D]", "D"),
    ("(c)", "C"),
    ("D)", "D"),
    ("**B**", "B"),
    ("`B`", "B"),
    ("$B$", "B"),
    ('"C"', "C"),
    ("Ｃ", "C"),
    (" \n B \n", "B"),
    ("B: 42 metres", "B"),
    ("B) because water is wet", "B"),
    ("A. Planetary density will decrease.", "A"),
    ("C\n\nThe other options are wrong.", "C"),
    ("Option C", "C"),
    ("Choice (D) fits.", "D"),
    ("The correct answer is A.", "A"),
    ("The correct answer is A", "A"),
    ("The correct answer is A because it is hot.", "A"),
    ("The correct answer is a.", "A"),
    ("The correct answer is: B", "B"),
    ("The correct answer is **(B)**.", "B"),
    ("The correct answer is option D.", "D"),
    ("The correct answer is\nD", "D"),
    ("the correct answer would be C", "C"),
    ("answer: (C)", "C"),
    ("Answer:C", "C"),
    ("ANSWER = d", "D"),
    ("Final answer: \\boxed{B}", "B"),
    ("So we get $\\boxed{\\text{(D)}}$", "D"),
    ("\\boxed{C}", "C"),
    ("\\(\\boxed{\\mathrm{A}}\\)", "A"),
    ("The answer to the question is most likely B.", "B"),
    ("The answer to question 5 is C, since B is too small.", "C"),
    ("I think it's D", "D"),
    ("I would go with C.", "C"),
    ("I choose B", "B"),
    ("It must be A.", "A"),
    ("My choice is D", "D"),
    ("The answer is A. Wait, that ignores friction. The correct answer is C.", "C"),
    ("Answer: B\nChecking once more...\nAnswer: D", "D"),
    ("A is too small and B too large, so the answer is D.", "D"),
    ("Statement 1 is false. (b)", "B"),
    ("Both statements hold, which leaves C", "C"),
    ("The correct answer is not A. It is B.", "B"),
    ("The answer isn't A, it's D", "D"),
    ("<think>Maybe the answer is A.</think>The correct answer is B.", "B"),
    ("Surely A.</think>\n\nC", "C"),
    ("答案是B", "B"),
    ("答案：Ｃ", "C"),
    ("正确答案为 D。", "D"),
    ("故选A", "A"),
    ("选择C。", "C"),
    ("正解はBです", "B"),
    ("정답은 D입니다", "D"),
    ("La respuesta correcta es B.", "B"),
    ("Die richtige Antwort ist C.", "C"),
    ("La bonne réponse est : D", "D"),
    ("الإجابة هي B", "B"),
]
NOTHING = [
    "",
    "The correct answer is Apple",
    "The correct answer is X.",
    "The correct answer is E.",
    "The correct answer is A/B/C/D.",
    "The correct answer is A or B.",
    "The answer is either A or B",
    "A or B",
    "A, B",
    "Both A and C",
    "The correct answer is a dog.",
    "A dog would bark.",
    "I cannot tell.",
    "A. one\nB. two\nC. three\nD. four",
    "The answer is not A.",
    "<think>The answer is B, but let me",
    "Because of Boyle's law.",
    "DNA carries it.",
    "B vitamins help, but C does too",
]


@pytest.mark.parametrize(("text", "letter"), CASES)
def test_the_option_a_reply_settles_on(text, letter):
    assert extract_option(text, "ABCD") == letter


@pytest.mark.parametrize("text", NOTHING)
def test_a_reply_that_names_none_or_several_chose_none(text):
    assert extract_option(text, "ABCD") is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct answer is Apple", "A"),
        ("The correct answer is apple.", "A"),
        ("Pear", "B"),
        ("pear tree", "C"),
        ("The correct answer is a plum.", "D"),
        ("A pear tree grows there", "C"),
        ("Apple or pear", None),
        ("A pineapple", None),
        ("The correct answer is B, the pear, and no apple.", "B"),
    ],
)
def test_an_option_may_be_quoted(text, letter):
    assert extract_option(text, "ABCD", FRUIT) == letter


@pytest.mark.parametrize("letter", "ABCDEFGHIJ")
@pytest.mark.parametrize(
    "form", ["The correct answer is {}.", "{}", "({})", "answer: {}", "I think it's {}", "\\boxed{{{}}}"]
)
def test_there_may_be_ten_options(form, letter):
    assert extract_option(form.format(letter), "ABCDEFGHIJ") == letter
    assert extract_option(form.format(letter), "ABCDEFGHIJKLMNOPQRSTUVWXYZ") == letter


def test_a_person_is_no_option():
    assert extract_option("I believe so.", "ABCDEFGHIJ") is None
    assert extract_option("I guess it's H", "ABCDEFGHIJ") == "H"


def test_thoughts_are_not_part_of_the_reply():
    assert strip_thoughts("<think>one</think> two <think>three") == "two"
