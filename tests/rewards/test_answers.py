import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.rewards.answers import extract_answer, unboxed, visible_text


def last(*turns: str, opened_reason: bool = True) -> str | None:
    return extract_answer(turns, opened_reason=opened_reason).last


def test_the_last_closed_visible_answer_counts():
    assert last("a</reason><answer>1</answer><answer>\\boxed{2}</answer>") == "2"
    assert last("a</reason><answer>1</answer>", "b</reason> no answer") == "1"
    assert last("a</reason><answer>1</answer> <answer>2") == "1"
    assert last("a</reason><answer>1<answer>2</answer>") == "2"
    assert last("a</reason>42") is None


def test_promise_7_reasoning_earns_nothing():
    assert last("<answer>42</answer>") is None
    assert last("<answer>42</answer></reason>") is None
    assert last("a</reason><reason><answer>42</answer></reason>") is None
    assert last("a</reason><reason><answer>42</answer>") is None
    assert last("a</reason><answer><reason>42</reason></answer>") is None
    assert last("<answer>42</answer>", opened_reason=False) == "42"
    assert last("<reason><answer>42</answer>", opened_reason=False) is None


def test_a_call_is_no_answer():
    assert last('a</reason><tool_call>{"code": "<answer>42</answer>"}</tool_call>') is None
    assert last("a</reason><tool_call>x</tool_call><answer>42</answer>") == "42"
    assert last("a</reason><tool_call>never closed <answer>42</answer>") == "42"


def test_no_tag_arises_where_something_was_taken_out_or_between_turns():
    assert last("a</reason><ans<reason>x</reason>wer>42</answer>") is None
    assert last("a</reason><answer>42</ans<tool_call>x</tool_call>wer>") is None
    assert last("a</reason><answer>42", "b</reason></answer>") is None
    assert last("a</reason><answer>4<reason>x</reason>2</answer>") == "4\n2"


def test_an_empty_answer_is_none_and_hides_earlier_ones():
    assert last("a</reason><answer>1</answer><answer> \\boxed{} </answer>") is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (" 42 ", "42"),
        ("\\boxed{42}", "42"),
        ("it is \\boxed{ \\frac{1}{2} } indeed", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\boxed{42}}", "42"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left\\{x\\right.}", "\\left\\{x\\right."),
        ("\\boxed{42", "\\boxed{42"),
        ("\\boxed{1} \\boxed{42", "1"),
        ("", ""),
    ],
)
def test_unboxed(content, expected):
    assert unboxed(content) == expected


@pytest.mark.parametrize(
    ("turns", "count", "balanced"),
    [
        (["<answer>1</answer>"], 1, True),  # in reasoning it earns nothing but counts
        (["r</reason><answer>1</answer><answer>2</answer>"], 2, True),
        (["r</reason><answer>1"], 0, False),
        (["r</reason>1</answer>"], 0, False),
        (["<answer>", "</answer>"], 0, False),
        (["<answer><answer>1</answer></answer>"], 1, False),
        (["no tag"], 0, True),
        ([], 0, True),
    ],
)
def test_counts_and_balance(turns, count, balanced):
    tags = extract_answer(turns, opened_reason=True)
    assert (tags.count, tags.balanced) == (count, balanced)


PIECES = ["<answer>", "</answer>", "<reason>", "</reason>", "<tool_call>", "</tool_call>", "42", "\\boxed{", "}", "x"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.booleans())
def test_visible_text_agrees_with_a_reading_character_by_character(turn, opened):
    visible, state, index = "", "reason" if opened else "", 0
    while index < len(turn):
        rest = turn[index:]
        if state == "reason":
            step = 9 if rest.startswith("</reason>") else 1
            state = "" if step > 1 else state
        elif rest.startswith("<reason>"):
            step, state, visible = 8, "reason", visible + "\n"
        elif rest.startswith("</reason>"):
            step, visible = 9, visible + "\n"
        elif rest.startswith("<tool_call>"):
            closing = rest.find("</tool_call>", 11)
            step, visible = (11 if closing < 0 else closing + 12), visible + "\n"
        else:
            step, visible = 1, visible + rest[0]
        index += step
    assert visible_text(turn, opened_reason=opened).replace("\n", "") == visible.replace("\n", "")


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=10).map("".join))
def test_an_unclosed_reason_never_earns(turn):
    assert extract_answer([turn.replace("</reason>", "")], opened_reason=True).last is None
