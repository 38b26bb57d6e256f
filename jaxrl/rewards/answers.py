"""The answer a policy gave, read from the text that the policy itself wrote.

Only visible text can hold an answer: what stands inside reasoning or inside a tool call does not count, and
each turn is read alone, so that no tag can be formed across the tool output between two turns. The reference
trainer (rStar2) looks for the last ``\\boxed`` of the whole transcript instead, tool output included.
"""

import dataclasses
import re
from collections.abc import Sequence

_HIDING_TAG = re.compile(r"<(reason|tool_call)>|</reason>")
_ANSWER_TAG = re.compile(r"<(/?)answer>")
_CLOSED_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_BOX = "\\boxed{"


@dataclasses.dataclass(frozen=True)
class AnswerTags:
    """What was found of answers in the turns of one trajectory.

    Attributes:
        last: content of the last closed visible answer tag (of the last box in it, where it has one); None where
            there is no such tag or nothing stands in it.
        count: closed answer tags in all that the policy wrote, reasoning and calls included.
        balanced: True where, in every turn, each opened tag was closed before the next was opened.
    """

    last: str | None
    count: int
    balanced: bool


def extract_answer(turns: Sequence[str], *, opened_reason: bool) -> AnswerTags:
    """Find the answer in what the policy wrote.

    Args:
        turns: text of each policy turn, in order, without any environment text.
        opened_reason: True where the environment opens every turn with a ``<reason>`` tag, so that a turn's text
            is reasoning until the policy closes it.
    """
    last = None
    for turn in turns:
        contents = _CLOSED_ANSWER.findall(visible_text(turn, opened_reason=opened_reason))
        if contents:
            last = unboxed(contents[-1]) or None
    return AnswerTags(
        last=last,
        count=sum(len(_CLOSED_ANSWER.findall(turn)) for turn in turns),
        balanced=all(_balanced(turn) for turn in turns),
    )


def visible_text(turn: str, *, opened_reason: bool) -> str:
    """One policy turn without its reasoning and its tool calls; a line break stands where something was taken out.

    Reasoning that is never closed runs to the end of the turn. A call that is never closed is no call and stays.
    """
    parts = []
    start = _after(turn, "</reason>", 0) if opened_reason else 0
    while start < len(turn):
        tag = _HIDING_TAG.search(turn, start)
        if tag is None:
            parts.append(turn[start:])
            break
        parts.append(turn[start : tag.start()])
        if tag.group(1) == "reason":
            start = _after(turn, "</reason>", tag.end())
        elif tag.group(1) == "tool_call" and "</tool_call>" in turn[tag.end() :]:
            start = _after(turn, "</tool_call>", tag.end())
        else:
            start = tag.end()
    return "\n".join(parts)


def unboxed(content: str) -> str:
    """What stands in the last ``\\boxed{...}`` of an answer, braces matched; without one, all of it stripped."""
    box = last_box(content)
    return content.strip() if box is None else unboxed(box)


def last_box(content: str) -> str | None:
    """What stands in the last ``\\boxed{...}`` of a text, braces matched; None without one."""
    start = content.find(_BOX)
    last = None
    while start >= 0:
        end = _closing_brace(content, start + len(_BOX))
        if end < 0:
            break
        last = content[start + len(_BOX) : end]
        start = content.find(_BOX, end)
    return last


def _closing_brace(text: str, start: int) -> int:
    """Index of the brace that closes the one before ``start``, or -1. Escaped braces are text."""
    depth, index = 1, start
    while index < len(text):
        if text[index] == "\\":
            index += 1
        elif text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return index
        index += 1
    return -1


def _after(text: str, tag: str, start: int) -> int:
    """Index behind the next ``tag``, or the end of the text."""
    found = text.find(tag, start)
    return len(text) if found < 0 else found + len(tag)


def _balanced(turn: str) -> bool:
    inside = False
    for tag in _ANSWER_TAG.finditer(turn):
        closes = bool(tag.group(1))
        if closes != inside:
            return False
        inside = not closes
    return not inside
