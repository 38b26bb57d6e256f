"""Reading the tool calls out of a policy turn (Hermes form, as rStar2-Agent reads it).

A call is a JSON object with ``name`` and ``arguments`` between ``<tool_call>`` and ``</tool_call>``. A closed span that
cannot be read is not dropped: it becomes a message for the model. An opened span that is never closed is no call.
A closing tag inside a code string ends the span early, since the tags are tokens and JSON is read only within them.

Every recorded case of rStar2's parser comes out alike, but for the message about a ``name`` that is no string: theirs
quotes a validation library, ours says what is wrong.
"""

import dataclasses
import json
from typing import Any

from jaxrl.text.tokens import CALL_CLOSE, CALL_OPEN

_PREFIX = "Failed to decode tool call: "


@dataclasses.dataclass(frozen=True)
class ParsedCall:
    """A call that could be read. ``arguments`` is any JSON value; whether it suits the tool is the tool's to say."""

    name: str
    arguments: Any


@dataclasses.dataclass(frozen=True)
class CallError:
    """A closed call that could not be read; ``message`` goes back to the model in its place."""

    message: str


@dataclasses.dataclass(frozen=True)
class ParsedTurn:
    """A policy turn apart: its text without the complete call spans, and its calls in order."""

    content: str
    calls: tuple[ParsedCall | CallError, ...]


def parse_tool_calls(text: str) -> tuple[ParsedCall | CallError, ...]:
    """The tool calls of a policy turn, in order; empty when no call span is complete."""
    return parse_turn(text).calls


def parse_turn(text: str) -> ParsedTurn:
    """Split a policy turn into remaining text and tool calls. Linear in the length of ``text``."""
    content, calls, position = [], [], 0
    while (start := text.find(CALL_OPEN, position)) >= 0:
        body = start + len(CALL_OPEN)
        end = text.find(CALL_CLOSE, body)
        if end < 0:
            break
        content.append(text[position:start])
        calls.append(_parse_call(text[body:end]))
        position = end + len(CALL_CLOSE)
    return ParsedTurn("".join(content) + text[position:], tuple(calls))


def _parse_call(body: str) -> ParsedCall | CallError:
    try:
        call = json.loads(body)
        name, arguments = call["name"], call["arguments"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return CallError(f"{_PREFIX}{error}")
    if not isinstance(name, str):
        return CallError(f"{_PREFIX}name must be a string, not {json.dumps(name)}")
    return ParsedCall(name, arguments)
