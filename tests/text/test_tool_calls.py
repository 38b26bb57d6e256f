"""The parser against rStar2's recorded behaviour, and what it adds."""

import json
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.text.tool_calls import CallError, ParsedCall, parse_tool_calls, parse_turn

# Where we differ on purpose: rStar2 shows the model the wording of its validation library, which names our internals.
OWN_MESSAGE = {
    "name_int": "Failed to decode tool call: name must be a string, not 5",
    "name_null": "Failed to decode tool call: name must be a string, not null",
}


def test_every_recorded_case(shared):
    recorded = json.loads((shared / "golden/rstar/tool_parser.json").read_text(encoding="utf-8"))["cases"]
    assert len(recorded) > 50
    for case in recorded:
        turn = parse_turn(case["inputs"]["text"])
        expected = case["outputs"]
        assert turn.content == expected["content"], case["id"]
        assert len(turn.calls) == len(expected["calls"]), case["id"]
        for call, wanted in zip(turn.calls, expected["calls"], strict=True):
            if wanted["type"] == "call":
                ascii_only = "ascii_only_note" in case
                assert call.name == wanted["name"], case["id"]
                assert json.dumps(call.arguments, ensure_ascii=ascii_only) == wanted["arguments"], case["id"]
            else:
                assert call.message == OWN_MESSAGE.get(case["id"], _this_python(wanted["text"])), case["id"]


def _this_python(message: str) -> str:
    """The json module of Python 3.13 words one message anew."""
    if sys.version_info >= (3, 13) and "Expecting property name enclosed in double quotes: line 1 column 32" in message:
        return "Failed to decode tool call: Illegal trailing comma before end of object: line 1 column 31 (char 30)"
    return message


def test_calls_and_errors_keep_their_order():
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call> x <tool_call>{</tool_call>'
    call, error = parse_tool_calls(text)
    assert call == ParsedCall("f", {})
    assert isinstance(error, CallError)


@pytest.mark.parametrize("body", ["[" * 100_000, '{"name": "f", "arguments": ' + "9" * 5000 + "}"])
def test_json_beyond_the_parser_is_an_error_for_the_model(body):
    (error,) = parse_tool_calls(f"<tool_call>{body}</tool_call>")
    assert isinstance(error, CallError)


@pytest.mark.parametrize(
    "text", ["<tool_call>" * 200_000, "</tool_call>" * 200_000, "<tool_call>x</tool_call>" * 50_000]
)
def test_time_is_linear(text):
    start = time.perf_counter()
    parse_turn(text)
    assert time.perf_counter() - start < 2


@settings(deadline=None)
@given(st.text(), st.dictionaries(st.text(), st.text()), st.text(alphabet="<>/tool_cal{} \n"))
def test_a_written_call_is_read_back(before, arguments, after):
    arguments = {key.replace("<", ""): value.replace("<", "") for key, value in arguments.items()}
    before, after = before.replace("<", ""), after.replace("</tool_call>", "").replace("<tool_call>", "")
    text = f"{before}<tool_call>{json.dumps({'name': 'f', 'arguments': arguments})}</tool_call>{after}"
    turn = parse_turn(text)
    assert turn.calls == (ParsedCall("f", arguments),)
    assert turn.content == before + after


@settings(deadline=None)
@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", '{"name": "f", "arguments": 1}', "x"])))
def test_any_order_of_tags_is_read_without_raising(parts):
    turn = parse_turn("".join(parts))
    assert len(turn.calls) == _reference(parts)


def _reference(parts: list[str]) -> int:
    opened, closed = False, 0
    for part in parts:
        if part == "</tool_call>" and opened:
            opened, closed = False, closed + 1
        elif part == "<tool_call>":
            opened = True
    return closed
