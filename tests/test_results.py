import time

import pytest

from kvfuse.evaluation.scoring.extraction import extract_option
from kvfuse.evaluation.scoring.results import equal_numbers, extract_number, extract_result, same_result


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $18.\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("#### $70,000", "70000"),
        ("#### -5", "-5"),
        ("#### 18.00 dollars", "18"),
        ("Answer: 18", "18"),
        ("Answer: $1,234.50", "1234.5"),
        ("The answer is 7 apples out of 12.", "7"),
        ("First 3, then 4.\nAnswer: 12 apples", "12"),
        ("That makes 10-5 = 5", "5"),
        ("The temperature is −3 degrees", "-3"),
        ("So it costs $ 2.5 .", "2.5"),
        ("**Answer:** 42", "42"),
        ("\\boxed{1{,}000}", "1000"),
        ("We find \\boxed{\\$36} in total, over 4 days.", "36"),
        ("<think>#### 1</think> It is 2", "2"),
        ("50%", "50"),
        ("１２", "12"),
        ("The total is 1200.", "1200"),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_a_reply_ends_in(text, number):
    assert extract_number(text) == number


# As small chat and base models really reply
NUMBERS = [
    # equations
    ("The answer is 16 - 3 - 4 = 9 eggs", "9"),
    ("the answer is x^2 = 25", "25"),
    ("The answer is x = 5.", "5"),
    ("Answer: 16 eggs - 3 eggs - 4 eggs = 9 eggs", "9"),
    ("Answer: $2 * 9 = $18", "18"),
    ("Answer: 2 * 3 + 4 = 6 + 4 = 10", "10"),
    ("Answer: 5 × (3 + 1) = 20 dollars for 4 days", "20"),
    ("Answer: 9 = 16 - 3 - 4", "9"),
    ("The answer is 9 eggs (16 - 3 - 4 = 9).", "9"),
    ("The answer is 18, since 9 * 2 = 18, over 7 days.", "18"),
    ("Answer: Total = 60 / 5 = 12 per day", "12"),
    ("\\boxed{16 - 3 - 4 = 9}", "9"),
    ("\\boxed{x = 5}", "5"),
    ("She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 9", "9"),
    ("The answer is 9*2 = <<9*2=18>>18 dollars", "18"),
    ("Answer: 20% of 50 = 10", "10"),
    ("The answer is that she has 16 - 3 - 4 = 9 eggs left for 2 days.", "9"),
    ("Answer: 3 \\times 4 = 12", "12"),
    # run-on questions and turns
    ("#### 70000\n\nQuestion: A robe takes 2 bolts of blue. How many in all?\n#### 3", "70000"),
    ("#### 70000 Question: A robe takes 2 bolts. #### 3", "70000"),
    ("#### 70000\n\nTom has 3 apples.\n#### 3", "70000"),
    ("Answer: 18\n\nQuestion: How many?\nAnswer: 3", "18"),
    ("The answer is 18.\n\nQ: How many?\nA: The answer is 3.", "18"),
    ("\\boxed{18}\n\nProblem 2: Find x.\n\\boxed{5}", "18"),
    ("So she has 18.\n\nHuman: And in 2 weeks?\nAssistant: 252", "18"),
    ("Answer: 18<|im_end|>\n<|im_start|>user\n4 more?", "18"),
    ("Question: 4 eggs at 2 dollars?\nAnswer: 8", "8"),
    # headings are no marks
    ("#### Step 1: Add\n3 + 4 = 7\n#### Step 2: Double\n2 * 7 = 14\n\n**Answer: 14**", "14"),
    ("#### 1. Add\n3 + 4 = 7\n#### 2. Double\nThat makes 14.", "14"),
    ("### Answer\n18", "18"),
    # currency, thousands, units, percentages
    ("#### 70,000.00", "70000"),
    ("Answer: 70\\,000", "70000"),
    ("Answer: $1,234,567", "1234567"),
    ("\\boxed{\\$1{,}200}", "1200"),
    ("\\boxed{18\\text{ dollars}}", "18"),
    ("Answer: 60 km/h", "60"),
    ("Answer: 12/day", "12"),
    ("Answer: €3.50", "3.5"),
    ("Answer: 12.5%", "12.5"),
    ("\\boxed{50\\%}", "50"),
    ("Answer: approximately 33.33", "33.33"),
    ("Answer: .5", "0.5"),
    ("Answer: 100", "100"),
    ("Answer: 0.0", "0"),
    ("Answer: 1" + "0" * 60, "1" + "0" * 60),
    # negatives
    ("Answer: -$5", "-5"),
    ("Answer: $-5", "-5"),
    ("The answer is negative 5.", "-5"),
    ("Answer: (-5)", "-5"),
    ("10-$5 = $5", "5"),
    # fractions
    ("1/2", "1/2"),
    ("Answer: 3/4 of the cake", "3/4"),
    ("\\boxed{\\frac{3}{4}}", "3/4"),
    ("Answer: \\dfrac12", "1/2"),
    ("Answer: 1 1/2 hours", "3/2"),
    ("Answer: -1/2", "-1/2"),
    ("10/2 = 5", "5"),
    # changes of mind, denials, ranges
    ("The answer is 9. Wait, let me check.\n9 * 2 = 18.\nSo the answer is 18.", "18"),
    ("The answer is not 12 but 15.", "15"),
    ("The answer isn't 12, it's 15", "15"),
    ("The answer is 12 or 15.", None),
    ("Answer: 10-12 days", None),
    ("Answer: 10 to 12", None),
    ("Answer: between 10 and 12", None),
    # where the answer stands
    ("The answer to question 5 is 18.", "18"),
    ("Answer: 18\n\nThis answer assumes 7 days a week.", "18"),
    ("Answer: 18 (for 2 days)\n\nLet me know if you need another answer!", "18"),
    ("The answer is below.\n3 * 4 = 12", "12"),
    ("**Final Answer:**\n\n**$18**", "18"),
    ("Final Answer: The final answer is $\\boxed{18}$. I hope it is correct.", "18"),
    ("Answer: N = 18", "18"),
    ("Answer:\n- **18**", "18"),
    ("Therefore, Janet makes \\$18 every day at the market.", "18"),
    ("答案是18，因为卖了9个，每个2元。", "18"),
    ("La respuesta es 18 porque vende 9 a 2.", "18"),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_the_number_of_a_small_models_reply(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    "loop", ["1 + ", "1 x ", "( ", "- ", "a b ", "1 of 1 ", "answer ", "\n", "1,", "1/", "\\boxed{", "* "]
)
def test_a_reply_that_loops_is_read_quickly(loop):
    start = time.perf_counter()
    extract_number("Answer: " + loop * (4000 // len(loop)))
    extract_result("Answer: " + loop * (4000 // len(loop)))
    extract_option("Answer: " + loop * (4000 // len(loop)), "ABCDEFGHIJ", ["one"])
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("reply", "answer", "equal"),
    [("1/2", "0.5", True), ("6/2", "3", True), ("3", "3", True), ("1/3", "0.33", False), ("1/2", "2", False)],
)
def test_numbers_are_compared_by_value(reply, answer, equal):
    assert equal_numbers(reply, answer) is equal


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("so $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("\\boxed{1} no, \\boxed{\\text{(}2, \\pi)}", "\\text{(}2, \\pi)"),
        ("We get x.\nAnswer: $3\\sqrt{2}$", "$3\\sqrt{2}$"),
        ("hence $x = 4$.", "x = 4"),
        ("\\boxed{unfinished", None),
        ("no idea", None),
        ("Answer: $x = 4$\n\nQuestion: And y?\nAnswer: $y = 5$", "$x = 4$"),
        ("\\boxed{4}\n\nProblem 2: Find y.\n\\boxed{5}", "4"),
        ("**Answer:** $\\frac{1}{2}$", "$\\frac{1}{2}$"),
        ("**Answer: 5**", "5"),
        ("Answer: The value is $5$.", "$5$"),
        ("The answer to part 2 is 7.", "7"),
        ("Answer: \\( \\frac{1}{2} \\)", "\\frac{1}{2}"),
        ("Answer: 3$\\pi$", "3$\\pi$"),
        ("Answer: $7$\n\nThis answer uses the sine rule.", "$7$"),
    ],
)
def test_the_formula_a_reply_ends_in(text, result):
    assert extract_result(text) == result


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\\frac{1}{2}", "0.5"),
        ("\\dfrac12", "\\frac{1}{2}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("10,000", "10000"),
        ("$4$", "x = 4"),
        ("90^\\circ", "90"),
        ("\\text{Evelyn}", "Evelyn"),
        ("2.0", "2"),
        ("50\\%", "50"),
        ("3\\sqrt2", "3\\sqrt{2}"),
        ("16 - 3 - 4 = 9", "9"),
    ],
)
def test_one_result_in_two_spellings(one, other):
    assert same_result(one, other)
    assert same_result(other, one)


@pytest.mark.parametrize(
    ("one", "other"), [("1", "2"), ("\\frac{1}{2}", "\\frac{1}{3}"), ("x+1", "x-1"), ("(1,2)", "(2,1)"), ("1/0", "0")]
)
def test_different_results(one, other):
    assert not same_result(one, other)


def test_algebra_where_it_can_be_checked():
    pytest.importorskip("math_verify")
    assert same_result("2x + 1", "1 + 2x")
