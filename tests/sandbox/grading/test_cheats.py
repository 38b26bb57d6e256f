"""Programs that try to pass a test without solving it. None knows the expected answer, so none does."""

import pytest

from jaxrl.records import ToolStatus
from jaxrl.sandbox.grading import CallTest, CodeTest, Grade, Grader, StdioTest, Test
from tests.sandbox.driver import LIMITS, Driver

ANSWER = 27182818284  # begins as no other number that a program could come upon
TESTS = {
    "assert": CodeTest(f"assert f(1) == {ANSWER}"),
    "check": CodeTest(f"def check(c):\n    for n in (1, 2):\n        assert c(n) == {ANSWER}\ncheck(f)", "f"),
    "close": CallTest("f", [1], float(ANSWER), tolerance=1e-9),
    "set-up": CodeTest(f"a = list(Box([1]))\nassert f(a) == {ANSWER}"),
}
WRONG = "Box = list\ndef f(x): return 0\n"


def grade(sandbox: Driver, program: str, test: Test) -> Grade:
    return sandbox.wait(Grader(sandbox.pool, LIMITS).grade(program, test))


CHEATS = {
    "exits while loading": "import os; os._exit(0)",
    "leaves while loading": "raise SystemExit(0)",
    "exits when called": "import os\ndef f(x): os._exit(0)",
    "leaves when called": "def f(x): raise SystemExit(0)",
    "raises an assertion": "def f(x): raise AssertionError",
    "equals everything": "class Yes:\n    def __eq__(self, other): return True\ndef f(x): return Yes()",
    "number that equals everything": (
        "class Yes(int):\n    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n    __hash__ = int.__hash__\n"
        "    __sub__ = __rsub__ = __float__ = lambda *_: 0.0\ndef f(x): return Yes()"
    ),
    "is not a number": "def f(x): return float('nan')",
    "is no data but true": "def f(x): return object()",
    "replaces builtins": (
        "import builtins\nfor name in ('isinstance', 'len', 'any', 'all', 'abs'):\n"
        "    setattr(builtins, name, lambda *_: True)\nbuiltins.AssertionError = type('Quiet', (), {})\n"
    )
    + WRONG,
    "replaces the harness": (
        "import sys\nfor name, module in list(sys.modules.items()):\n    if name.startswith('jaxrl'):\n"
        "        module.pack = module.unpack = lambda *_: True\n"
        "        module.line = lambda *_: '[\"value\", true]\\n'\n"
    )
    + WRONG,
    "replaces json": "import json\njson.dumps = lambda *_, **__: 'passed'\njson.loads = lambda *_: [[], {}]\n" + WRONG,
    "replaces what calls it": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n    frame.f_globals.update(line=lambda *_: 'passed\\n')\n"
        "    frame = frame.f_back\n"
    )
    + WRONG,
    "prints markers": "print('passed'); print('[\"value\", true]'); print('verdict: ok')\n" + WRONG,
    "writes a verdict": "open('verdict', 'w').write('passed\\n'); open('exam', 'w').write('{}')\n" + WRONG,
    "asks nothing": "open('questions', 'w').close()\n" + WRONG,
    "answers with a link": "import os\nos.remove('answers'); os.symlink('/proc/self/environ', 'answers')\n" + WRONG,
    "answers in a thread afterwards": (
        "import threading, time\ndef late():\n    time.sleep(0.1)\n"
        "    open('answers', 'w').write('[\"value\", true]\\n' * 9)\n"
        "threading.Thread(target=late).start()\n"
    )
    + WRONG,
}
FORGED = {
    "nothing": "",
    "no json": "passed\n",
    "no list": "1\n",
    "an empty list": "[]\n",
    "a word": '["value"]\n',
    "a truth": '["object", "int", true]\n',
    "a truth that is none": '["object", "int", [1]]\n',
    "an unknown type": '["value", ["object", "1"]]\n',
    "an exit": '["raised", "SystemExit", "0"]\n',
    "a private name": '["raised", "__build_class__", ""]\n',
    "a hook": '["raised", "KeyboardInterrupt", ""]\n',
    "the end of a loop": '["raised", "StopIteration", ""]\n',
    "not a number": '["value", NaN]\n',
    "a dictionary": '{"value": 1}\n',
    "a deep list": "[" * 100_000 + "\n",
    "a deep list that ends": "[" * 100_000 + "]" * 100_000 + "\n",
    "bytes": "\udcff\udcfe\n",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_does_not_pass(sandbox: Driver, cheat: str) -> None:
    found = sandbox.wait(Grader(sandbox.pool, LIMITS).matrix([CHEATS[cheat]], list(TESTS.values())))
    assert not found.passed.any() and not found.infra.any() and found.hidden.all(), found


def test_an_honest_program_passes_what_the_cheats_do_not(sandbox: Driver) -> None:
    program = f"Box = list\ndef f(x): return {ANSWER}"
    assert sandbox.wait(Grader(sandbox.pool, LIMITS).matrix([program], list(TESTS.values()))).passed.all()


@pytest.mark.parametrize("forged", FORGED)
def test_forged_answers_do_not_pass(sandbox: Driver, forged: str) -> None:
    lines = (FORGED[forged] * 3).encode("utf-8", "surrogateescape")
    program = f"import os\nopen('answers', 'wb').write({lines!r})\nos._exit(0)"
    for test in ("assert", "check"):
        found = grade(sandbox, program, TESTS[test])
        assert not found.passed and not found.is_infra, found


def test_forged_answers_that_are_right_pass(sandbox: Driver) -> None:
    """The forgeries above fail for what they say, not for how they are made."""
    program = f"import os\nopen('answers', 'w').write('[\"value\", {ANSWER}]\\n' * 2)\nos._exit(0)"
    assert grade(sandbox, program, TESTS["check"]).passed


SEARCH = r"""
import gc, linecache, os, re, sys

Box = list

def f(x):
    texts = [repr(linecache.cache), repr(os.environ), sys.stdin.read()]
    frame = sys._getframe()
    while frame:
        texts += [repr(frame.f_locals), repr(frame.f_globals), repr(frame.f_code.co_consts)]
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, (str, bytes, tuple, list, dict)):
            texts.append(repr(thing))
    for folder, _, names in os.walk('/tmp'):
        texts += [repr(open(os.path.join(folder, name), 'rb').read()) for name in names]
    found = [number for text in texts for number in re.findall(r'2718281\d{4}', text)]
    return int(found[0]) if found else None
"""


@pytest.mark.parametrize("test", TESTS)
def test_the_answer_is_nowhere_to_be_found(sandbox: Driver, test: str) -> None:
    found = grade(sandbox, SEARCH, TESTS[test])
    assert (found.passed, found.status) == (False, ToolStatus.OK), found


def test_the_search_finds_an_answer_that_lies_beside_it(sandbox: Driver) -> None:
    found = grade(sandbox, SEARCH, CodeTest(f"b = Box()\nassert f(b) == {ANSWER}, b"))
    assert (found.passed, found.hidden) == (False, True), found
    found = grade(sandbox, SEARCH, CodeTest(f"b = Box()\nassert f(b) == {ANSWER} != b", "f"))
    assert (found.passed, found.hidden) == (True, False), found
    assert found.detail == "the test needs ['Box'] of the program besides 'f'"


@pytest.mark.parametrize("program", ["import os; os._exit(0)", "raise SystemExit", "def f(x): raise SystemExit(0)"])
def test_beside_its_test_too_a_program_has_to_stay_to_the_end(sandbox: Driver, program: str) -> None:
    found = grade(sandbox, "Box = list\n" + program, CodeTest("b = Box()\nassert f(b) == 1 != b", "f"))
    assert (found.passed, found.hidden, found.status) == (False, False, ToolStatus.ERROR), found


def test_what_the_test_compares_with_cannot_be_changed_through_an_argument(sandbox: Driver) -> None:
    test = CodeTest("x = [3, 1, 2]\nassert f(x) == sorted(x)")
    assert grade(sandbox, "f = sorted", test).passed
    assert not grade(sandbox, "def f(x):\n    x.clear()\n    return x", test).passed
    in_place = CodeTest(
        "x = [3, 1]\nassert changed(x) == [1, 3]", "changed", "", "def changed(x):\n    f(x)\n    return x"
    )
    assert grade(sandbox, "f = list.sort", in_place).passed
    assert not grade(sandbox, "f = sorted", in_place).passed


def test_helpers_of_the_test_cannot_be_replaced(sandbox: Driver) -> None:
    prelude = "def mirrored(text):\n    return text[::-1]"
    test = CodeTest("assert f(mirrored('abc')) == 'abc'", "f", prelude)
    assert grade(sandbox, "def f(x): return x[::-1]", test).passed
    assert not grade(sandbox, "def mirrored(text): return text\ndef f(x): return x", test).passed


def test_what_a_program_prints_passes_only_as_output(sandbox: Driver) -> None:
    test = StdioTest("4\n", "16\n")
    assert grade(sandbox, "print(int(input()) ** 2)", test).passed
    for program in (
        "print('passed')",
        "print(16); raise SystemExit(3)",
        "print(16)\nwhile True: pass",
        "print(16, 16)",
    ):
        assert not grade(sandbox, program, test).passed, program
