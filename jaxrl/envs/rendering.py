"""What the policy reads of a tool call.

The text depends only on what the call did, never on how long it took, so that the tokens of an episode do not depend
on timing. It is shorter than the reference's (rStar2-Agent writes a status line, labelled streams and the execution
time): a small model pays for every token. Whether a call failed is in its status, not in this text.
"""

from typing import Literal

from jaxrl.config import ConfigError
from jaxrl.records import ToolCall, ToolStatus
from jaxrl.text.tokenizer import Tokenizer

NO_OUTPUT = "(no output)"
CUT_MARK = "\n[...]\n"

# Nothing that such a call printed is shown: how far it came is a matter of timing.
_STOPPED = {
    ToolStatus.TIMEOUT: "time limit exceeded",
    ToolStatus.OUT_OF_MEMORY: "out of memory",
    ToolStatus.OUTPUT_LIMIT: "too much output",
}
_LONGEST_TOKEN = 64  # characters; text far beyond the limit is not tokenised only to be thrown away


def render(call: ToolCall, traceback: Literal["last", "full"] = "last") -> str:
    """The text of one call for the policy.

    ``OK``: standard output, then standard error. ``ERROR``: standard output, then the error (``traceback`` "last": what
    follows the last frame, such as ``NameError: name 'x' is not defined``). Stopped calls: one fixed line. Calls
    that were not run (``PARSE_ERROR``, ``UNKNOWN_TOOL``, ``BAD_ARGUMENTS``): the reason.

    Raises:
        ValueError: for ``INFRA_ERROR``, which the policy must never see.
    """
    if call.status is ToolStatus.INFRA_ERROR:
        raise ValueError("a call that failed by our own fault has no text for the policy; end the trajectory instead")
    if call.status in _STOPPED:
        return _STOPPED[call.status]
    error = call.stderr.strip()
    if call.status is ToolStatus.ERROR and traceback == "last":
        error = _final_message(error)
    return "\n".join(part for part in (call.stdout.strip(), error) if part) or NO_OUTPUT


def _final_message(error: str) -> str:
    """What follows the last frame (indented lines) of a traceback; of other text the last line."""
    lines = error.splitlines()
    indented = [index for index, line in enumerate(lines) if line.startswith(" ")]
    message = lines[indented[-1] + 1 :] if indented else []
    return "\n".join(message or lines[-1:]).strip()


def tokenize_output(text: str, tokenizer: Tokenizer, max_tokens: int) -> list[int]:
    """Token ids of a tool's text, cut once in the middle to at most ``max_tokens``, mark included.

    No token of the result is a control token, and no character is split at the cut. The tail gets the odd token:
    the last line of an error is what matters most.

    Raises:
        ConfigError: as ``check_limit``.
    """
    reach = max_tokens * _LONGEST_TOKEN
    if len(text) <= 2 * reach:
        head = tail = tokenizer.encode(text)
        if len(head) <= max_tokens:
            return head
    else:
        head, tail = tokenizer.encode(text[:reach]), tokenizer.encode(text[-reach:])
    mark = tokenizer.encode(CUT_MARK)
    check_limit(tokenizer, max_tokens)
    room = max_tokens - len(mark)
    return _whole_head(head, room // 2, tokenizer) + mark + _whole_tail(tail, room - room // 2, tokenizer)


def check_limit(tokenizer: Tokenizer, max_tokens: int) -> None:
    """Refuse a limit too small for any cut text.

    Raises:
        ConfigError: it cannot hold the mark and a token on either side.
    """
    mark = len(tokenizer.encode(CUT_MARK))
    if max_tokens < mark + 2:
        raise ConfigError(
            f"max_tool_tokens={max_tokens} cannot hold the cut mark of {mark} tokens and a token on either side; "
            f"raise EnvConfig.max_tool_tokens to at least {mark + 2}"
        )


def _whole_head(ids: list[int], count: int, tokenizer: Tokenizer) -> list[int]:
    """The first ``count`` ids, fewer where the last would end within a character."""
    text = tokenizer.decode(ids)
    while count and not text.startswith(tokenizer.decode(ids[:count])):
        count -= 1
    return ids[:count]


def _whole_tail(ids: list[int], count: int, tokenizer: Tokenizer) -> list[int]:
    """The last ``count`` ids, fewer where the first would begin within a character."""
    text = tokenizer.decode(ids)
    while count and not text.endswith(tokenizer.decode(ids[-count:])):
        count -= 1
    return ids[-count:] if count else []
