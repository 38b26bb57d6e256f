"""One verifier process: reads questions on stdin, answers on stdout, one JSON object a line.

Run as a script by ``jaxrl.rewards.verifier`` in a fresh interpreter that never imports jax. The parent holds the
deadline and kills a process that is late; the alarm here ends one whose parent is gone. math-verify's own
time limits are off: they use SIGALRM inside library code that swallows the exception, and answer "wrong".
"""

import functools
import json
import logging
import os
import re
import resource
import signal
import sys

ADDRESS_SPACE = 2 << 30  # bytes; an answer such as 10^{10^{10}} would otherwise take the machine's memory
ORPHAN_GRACE = 2.0  # seconds after the parent's deadline

# Numbers side by side, or joined by something that is no operation on numbers: math-verify adds "40 2" up to 42 and
# reads the last one of others.
_TWO_NUMBERS = re.compile(
    r"[0-9][)}\]]?"
    r"(?:\s|~|&|\\[,;:! \\]|\\q?quad\b|\)\s*\(|"
    r"\\(?:to|rightarrow|Rightarrow|implies|lor|vee|land|wedge|cup|cap|approx|sim|equiv|mid|backslash)\b|,|;|\|)+"
    r"[({\[]?[0-9]"
)
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:/[0-9]+)?|-?\\[dt]?frac\{-?[0-9]+\}\{-?[0-9]+\}")


def correct(answer: str, gold: str) -> bool | None:
    """Whether ``answer`` is mathematically the same as ``gold`` by math-verify (both taken as the content of a box).

    Where the gold answer is one number, an answer that shows several numbers without an operation between them is
    wrong, and so is an answer whose braces would end the box early. None where the gold answer itself cannot be read.
    """
    import math_verify

    expected = _parse(gold)
    if not expected:
        return None
    if not _braces_match(answer):
        return False
    if _NUMBER.fullmatch(gold.strip()) and _TWO_NUMBERS.search(answer):
        return False
    return bool(math_verify.verify(expected, _parse(answer), timeout_seconds=None))


@functools.lru_cache(maxsize=256)
def _parse(text: str) -> list:
    import math_verify

    return math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None)


def _braces_match(text: str) -> bool:
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0


def main(seconds: float) -> None:
    """Answer questions until stdin ends. ``seconds`` is the parent's deadline for one of them."""
    # Whatever a library prints must not mix with the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        correct("x", "x+1")  # imports and warms up everything that a verdict needs
    except ImportError as error:
        print(json.dumps({"failed": f"{error}; install math-verify[antlr4-13-2]"}), file=replies, flush=True)
        return
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds + ORPHAN_GRACE)
        question = json.loads(line)
        verdict = correct(question["answer"], question["gold"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"correct": verdict}), file=replies, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
