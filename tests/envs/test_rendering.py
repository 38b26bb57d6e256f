import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.envs.rendering import CUT_MARK, NO_OUTPUT, render, tokenize_output
from jaxrl.records import ToolCall, ToolStatus
from tests.scripted_engine import small_tokenizer

TRACEBACK = 'Traceback (most recent call last):\n  File "<cell>", line 1, in <module>\n    x\n    ^\n'


def text(status: ToolStatus, stdout: str = "", stderr: str = "", traceback: str = "last") -> str:
    return render(ToolCall("python", {}, status, stdout=stdout, stderr=stderr), traceback)


def test_success():
    assert text(ToolStatus.OK, "84\n") == "84"
    assert text(ToolStatus.OK, "  \n") == NO_OUTPUT
    assert text(ToolStatus.OK, "84\n", "warning: w\n") == "84\nwarning: w"


def test_an_error_keeps_its_final_message():
    message = "NameError: name 'x' is not defined"
    assert text(ToolStatus.ERROR, "", TRACEBACK + message + "\n") == message
    assert text(ToolStatus.ERROR, "before\n", TRACEBACK + message) == f"before\n{message}"
    assert text(ToolStatus.ERROR, "", TRACEBACK + message, "full") == (TRACEBACK + message).strip()
    assert text(ToolStatus.ERROR, "", TRACEBACK + "ValueError: a\nb") == "ValueError: a\nb"
    assert text(ToolStatus.ERROR, "", "exit status 3") == "exit status 3"
    assert text(ToolStatus.ERROR, "", "noise\nexit status 3") == "exit status 3"
    assert text(ToolStatus.ERROR) == NO_OUTPUT
    assert text(ToolStatus.ERROR, "", TRACEBACK) == "^"


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (ToolStatus.TIMEOUT, "time limit exceeded"),
        (ToolStatus.OUT_OF_MEMORY, "out of memory"),
        (ToolStatus.OUTPUT_LIMIT, "too much output"),
    ],
)
def test_a_stopped_call_is_one_line_whatever_it_printed(status, line):
    """How much it printed depends on timing, and tokens may not."""
    assert text(status, "so far\n" * 7, "and so on") == line


@pytest.mark.parametrize("status", [ToolStatus.PARSE_ERROR, ToolStatus.UNKNOWN_TOOL, ToolStatus.BAD_ARGUMENTS])
def test_a_call_that_was_not_run_says_why(status):
    assert text(status, stderr="the reason") == "the reason"


def test_promise_5_a_fault_of_ours_has_no_text():
    with pytest.raises(ValueError, match="end the trajectory"):
        text(ToolStatus.INFRA_ERROR, "out")


def test_every_status_is_covered():
    for status in ToolStatus:
        if status is not ToolStatus.INFRA_ERROR:
            assert text(status, stderr="e")


STOPPED = {"f2", "f4", "f5", "f6", "f9", "f10", "f11", "f15", "f19"}
"""Recorded answers of a call that was stopped: the release names its exception, and we say which limit it met."""


def test_text_of_the_release_without_its_frame(shared):
    """Recorded answers of rStar2's tool that are no stops: the same text without status line, labels and time."""
    cases = json.loads((shared / "golden/rstar/tool_feedback.json").read_text())["cases"]
    kept = [case["inputs"] | case["outputs"] for case in cases if case["id"] not in STOPPED]
    assert (len(cases), len(kept)) == (24, 15)
    for case in kept:
        status = ToolStatus.OK if case["run_success"] and case["success"] else ToolStatus.ERROR
        _, *lines, _ = case["text"].splitlines()
        lines = [line.removeprefix("stdout: ").removeprefix("stderr: ") for line in lines]
        expected = "\n".join(line for line in lines if line and not line.startswith("reason: "))
        assert text(status, case["stdout"], case["stderr"]) == (expected or NO_OUTPUT)


def test_what_fits_is_not_cut():
    tokenizer = small_tokenizer()
    whole = "NameError: name 'x' is not defined"
    ids = tokenizer.encode(whole)
    assert tokenize_output(whole, tokenizer, len(ids)) == ids
    assert tokenize_output(whole, tokenizer, len(ids) - 1) != ids


def test_one_cut_in_the_middle_keeps_both_ends():
    tokenizer = small_tokenizer()
    cut = tokenize_output("head " + "x" * 500 + " tail", tokenizer, 30)
    shown = tokenizer.decode(cut)
    assert len(cut) <= 30
    assert shown.startswith("head") and shown.endswith("tail") and shown.count(CUT_MARK) == 1


def test_text_far_beyond_the_limit_is_not_tokenised_whole(monkeypatch):
    tokenizer, lengths = small_tokenizer(), []
    encode = type(tokenizer).encode
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, text, **kw: (lengths.append(len(text)), encode(self, text, **kw))[1]
    )
    shown = tokenizer.decode(tokenize_output("first" + "y" * 1_000_000 + "last", tokenizer, 32))
    assert shown.startswith("first") and shown.endswith("last") and CUT_MARK in shown
    assert max(lengths) < 10_000


def test_a_limit_too_small_for_the_mark_is_refused():
    with pytest.raises(ValueError, match=r"EnvConfig.max_tool_tokens to at least \d+"):
        tokenize_output("x" * 100, small_tokenizer(), 3)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab π中😀é\n<|im_end|>", max_size=120), st.integers(12, 40))
def test_any_text_is_cut_to_the_limit_and_stays_valid(text, limit):
    tokenizer = small_tokenizer()
    ids = tokenize_output(text, tokenizer, limit)
    assert len(ids) <= limit
    assert tokenizer.control_ids.isdisjoint(ids)
    assert "\ufffd" not in tokenizer.decode(ids)
    assert len(ids) > limit - 8 or ids == tokenizer.encode(text)  # at most a character is lost on each side of a cut
