"""Stories are right, short, reproducible, and never in both splits."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.data import stories as stories_module
from jaxrl.data.stories import LARGEST, SMALLEST, make_stories


@pytest.fixture(scope="module")
def stories():
    return make_stories(3000, 0, "train")


def test_the_answer_is_the_value_of_the_expression(stories):
    for story in stories:
        assert story.problem.answer == str(eval(story.expression))
        assert int(story.problem.answer) >= 1


def test_every_number_of_the_text_is_in_the_expression_and_in_range(stories):
    for story in stories:
        in_text = [int(number) for number in re.findall(r"\d+", story.problem.question)]
        assert in_text == list(story.numbers)
        assert {*in_text} == {int(number) for number in re.findall(r"\d+", story.expression)}
        assert all(SMALLEST <= number <= LARGEST for number in in_text)


def test_texts_are_short_and_complete(stories):
    for story in stories:
        assert len(story.problem.question.split()) <= 40
        assert story.problem.question.endswith("?")
        assert not set("{}") & set(story.problem.question)


def test_many_templates_of_one_and_two_steps(stories):
    skeletons = {re.sub(r"[A-Z][a-z]+|\d+", "_", story.problem.question).split("_", 2)[-1] for story in stories}
    assert len(skeletons) >= 20
    patterns = {story.pattern for story in stories}
    steps = {pattern: len(re.findall(r"//|[-+*]", pattern)) for pattern in patterns}
    assert set(steps.values()) == {1, 2}
    assert all(any(operator in pattern for pattern in patterns) for operator in ("+", "-", "*", "//"))


def test_equal_shares_leave_nothing_over(stories):
    shared = [story for story in stories if "equally" in story.problem.question]
    assert shared
    for story in shared:
        assert story.numbers[0] % story.numbers[1] == 0


def test_texts_and_ids_are_unique(stories):
    assert len({story.problem.question for story in stories}) == len(stories)
    assert len({story.problem.id for story in stories}) == len(stories)


def test_a_longer_sequence_begins_with_the_shorter(stories):
    assert make_stories(50, 0, "train") == stories[:50]
    assert make_stories(50, 1, "train") != stories[:50]


@settings(max_examples=20, deadline=None)
@given(seeds=st.tuples(st.integers(), st.integers()), counts=st.tuples(st.integers(0, 300), st.integers(0, 300)))
def test_splits_never_share_a_text(seeds, counts):
    train = {story.problem.question for story in make_stories(counts[0], seeds[0], "train")}
    held = {story.problem.question for story in make_stories(counts[1], seeds[1], "eval")}
    assert not train & held
    assert (len(train), len(held)) == counts


def test_splits_do_not_meet_where_texts_are_few(monkeypatch):
    """With some two thousand texts in all, independent draws would meet."""
    monkeypatch.setattr(stories_module, "_TEMPLATES", stories_module._TEMPLATES[:1])
    monkeypatch.setattr(stories_module, "_NAMES", stories_module._NAMES[:2])
    monkeypatch.setattr(stories_module, "LARGEST", 9)
    train = {story.problem.question for story in make_stories(1500, 0, "train")}
    held = {story.problem.question for story in make_stories(150, 1, "eval")}
    assert not train & held


def test_unknown_split():
    with pytest.raises(ValueError, match='split="test"'):
        make_stories(1, 0, "test")
