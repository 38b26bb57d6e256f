import json

import pytest

from jaxrl.rewards.answers import unboxed
from jaxrl.rewards.integers import same_integer
from jaxrl.rewards.math_worker import correct

# Where the reference says otherwise than we do, and why. It accepts what either of two graders accepts.
DIFFERENT = {
    "s14": "π is not 3.14159: the reference rounds generously",
    "s16": "6.28 is not 2π",
    "s38": "1e3 is no LaTeX; the prompt asks for a plain number",
    "s42": "an open interval is not a half-open one",
}
UNTAGGED = {"s60", *(f"s{number}" for number in range(75, 93) if number != 83)}
"""Without a box in an answer tag, or with an empty one: the reference searches the whole text, here it is no answer."""


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("\\frac{84}{2}", "42", True), ("84/2", "42", True), ("x=42", "42", True), ("(42)", "42", True),
        ("42\\text{ apples}", "42", True), ("2\\sqrt{3}", "\\sqrt{12}", True), ("0.5", "\\frac{1}{2}", True),
        ("(x+1)^2", "x^2+2x+1", True), ("\\{2,1\\}", "\\{1,2\\}", True), ("43", "42", False), ("x", "42", False),
        ("1 \\frac{1}{2}", "\\frac{3}{2}", True), ("41.9999999", "42", False), ("\\frac", "42", False),
    ],
)  # fmt: skip
def test_mathematical_equality(answer, gold, expected):
    assert correct(answer, gold) is expected


@pytest.mark.parametrize(
    "answer",
    ["40 2", "40\\,2", "40\\quad 2", "41,42", "41;42", "41 or 42", "41 \\text{ or } 42", "\\{41,42\\}", "[41,42]",
     "41 \\to 42", "41 \\lor 42", "41 \\approx 42", "41 & 42", "\\pm 42", "42}{41", "41}\\boxed{42", "(40)(2)",
     "41 \\\\ 42", "40<x<42", "x=42 \\text{ or } x=41", "41\n42", "The answer is 42"],
)  # fmt: skip
def test_two_numbers_are_never_one(answer):
    assert correct(answer, "42") is False


def test_no_answer_is_right_for_two_different_integers():
    for answer in ("41=42", "42=41", "x=41=42", "41:42", "42_{41}", "\\min(41,42)", "42 \\neq 41", "41\\equiv 42"):
        assert not (correct(answer, "41") and correct(answer, "42"))


def test_an_unreadable_expected_answer_is_said():
    assert correct("42", "") is None


def test_agreement_with_the_reference(shared):
    """The reference grades the whole text; we grade the answer tag. Only its rows with such a tag are comparable."""
    cases = json.loads((shared / "golden/rstar/answer_scoring.json").read_text())["cases"]
    untagged, disagreements = set(), {}
    for case in cases:
        text, gold = case["inputs"]["response_text"], case["inputs"]["ground_truth"]
        answer = unboxed(text.partition("<answer>")[2].partition("</answer>")[0])
        if "\\boxed{" not in text or not answer:
            untagged.add(case["id"])
            continue
        ours = same_integer(answer, gold)
        ours = correct(answer, gold) if ours is None else ours
        if ours != bool(case["outputs"]["score"]):
            disagreements[case["id"]] = ours
    assert len(cases) == 93 and untagged == UNTAGGED
    assert disagreements == dict.fromkeys(DIFFERENT, False)
