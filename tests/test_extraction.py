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
# As small chat and base models really reply
REPLIES = [
    # run-on questions, in several labels, and turns of a chat
    ("B\n\nQuestion: Which gas do plants take in?\n\nChoices:\nA. O\nB. N\nC. CO2\nD. He\nAnswer: C", "B"),
    ("B. 42 metres\n\nQuestion 2: How far?\nAnswer: D", "B"),
    ("The correct answer is A.\n\nQuestion: Next?\nThe correct answer is D.", "A"),
    ("C\n\n**Question:** What else?\n**Answer:** A", "C"),
    ("Answer: D\n\n### Question 7\nWhich?\nAnswer: B", "D"),
    ("A\n\nQ: Why?\nA: Because it rains. The answer is C.", "A"),
    ("The correct answer is D.\nHuman: Are you sure?\nAssistant: The correct answer is B.", "D"),
    ("B<|im_end|>\n<|im_start|>user\nWhat now? (A)<|im_end|>\n<|im_start|>assistant\nThe answer is C.", "B"),
    ("The answer is B.</s>The answer is C.", "B"),
    ("C\nuser\nAnd the next one?\nassistant\nThe correct answer is A.", "C"),
    ("B\n\n问题：下一个？\n答案：C", "B"),
    ("Problem: as above\nAnswer: C", "C"),
    # a repeated question is no run-on
    ("Sure!\n\nQuestion: Which is red?\nA. sky\nB. blood\nAnswer: B", "B"),
    ("Question: Which is red?\n\nChoices:\nA. sky\nB. blood\n\nThe correct answer is B.", "B"),
    # preambles and explanations
    ("Sure, I'd be happy to help! The correct answer is C.", "C"),
    ("To find the best option, let's compare all choices:\n\nA. too dry\nB. too wet\nC. right\n\nSo it is C.", "C"),
    ("Based on the given choices, the most appropriate answer is C) It rains.", "C"),
    ("**Answer: B**\n\n**Explanation:** A is wrong because it is cold, and C is too far.", "B"),
    ("The correct answer is **B. gravity**.\n\nHere is why:\n- A is a planet.\n- D is a star.", "B"),
    ("The correct answer is B, not A.", "B"),
    ("The answer is not A but C", "C"),
    ("It cannot be A or B, so it must be C.", "C"),
    ("Options A and B are incorrect. The correct option is C.", "C"),
    ("C is the correct answer, as A and B are both too small.", "C"),
    ("A is incorrect. B is incorrect. C is correct. D is incorrect.", "C"),
    ("Option B is correct because option A leaves out the mass.", "B"),
    ("Option (D) is the best choice here; (A) comes close.", "D"),
    ("A would take too long, and B too much. I'd say D.", "D"),
    ("Not A, since that is a fish, and C is a bird. Therefore, B.", "B"),
    ("While A and C both fit, the best match is D.", "D"),
    ("The correct answer, in my view, is B, although A is close.", "B"),
    ("I am not sure, but I would choose D.", "D"),
    ("I believe the correct answer to be B.", "B"),
    ("My final answer is C", "C"),
    ("Final Answer: The final answer is $\\boxed{D}$. I hope it is correct.", "D"),
    ("$$\\boxed{B}$$", "B"),
    ("\\boxed{\\textbf{(B)}}", "B"),
    ("\\boxed{\\text{B. gravity}}", "B"),
    ("<answer> B </answer>", "B"),
    ("A fits less well than B. <answer>B</answer>", "B"),
    ('{"answer": "C"}', "C"),
    ("The answer is <b>D</b>.", "D"),
    ("The correct answer is D. All of the above.", "D"),
    ('The correct answer is "B."', "B"),
    ("The correct answer is: \n\n**C**", "C"),
    # options written out first
    ("A. one\nB. two\nC. three\nD. four\n\nThe correct answer is B.", "B"),
    ("A. one\nB. two\nC. three\nD. four\n\nB", "B"),
    ("A) one\nB) two\nC) three\nD) four\n\n**C**", "C"),
    ("A: no\nB: yes\n\nTherefore, the answer is option (B).", "B"),
    ("- A: heavy\n- B: light\n\nThe right choice: B", "B"),
    ("因此，正确答案是 **C**。", "C"),
    ("因此选B。", "B"),
]
REPLIES_WITHOUT_AN_OPTION = [
    "A\nB\nC\nD",
    "The correct answer is either A. or B.",
    "A or B\n\nQuestion: Next?\nAnswer: C",
    "A is not correct, and B is not correct.",
    "Sure, I can help! Please give me the choices.",
    "A. The sky is right\nB. The sky is left",
]


@pytest.mark.parametrize(("text", "letter"), CASES + REPLIES)
def test_the_option_a_reply_settles_on(text, letter):
    assert extract_option(text, "ABCD") == letter


@pytest.mark.parametrize("text", NOTHING + REPLIES_WITHOUT_AN_OPTION)
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
        ("Pear\n\nQuestion: Which is round?\nAnswer: D", "B"),
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
