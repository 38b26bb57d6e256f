"""How a test is carried out: what runs beside the program, what runs away from it. Decided from the test alone.

If a program could bring it about that its test is run beside it, it could read the expected answers there.
"""

import ast
import builtins
import dataclasses
import itertools
import json
import symtable
import sys
from collections.abc import Iterator

from jaxrl.sandbox.grading.cases import PRELUDES, CodeTest
from jaxrl.sandbox.grading.codec import line, pack

_ASKED = "_jaxrl_asked"
_PROGRAM = "program"  # the module as which ``answering`` loads a program


@dataclasses.dataclass(frozen=True)
class Plan:
    """One test, divided."""

    function: str = ""  # the program's function that is called
    beside: str = ""  # source that runs after the program, in its module
    exam: bytes = b""  # what the test's jail is given
    obstacle: str = ""  # why the test has to run beside the program; empty if it does not
    questions: bytes = b""  # what the test asks first, where it can be read off it
    right_answers: bytes | None = None  # answers, to the byte, that need no examination
    alone: tuple[str, str] | None = None  # prelude and first statements, which run without any program or never


def divide(test: CodeTest) -> Plan:
    """The plan for a test."""
    strangers = _strangers(f"{test.prelude}\n{test.code}")
    return dataclasses.replace(_divide(test, strangers), alone=_alone(test, strangers))


def _divide(test: CodeTest, strangers: set[str]) -> Plan:
    if (divided := _divide_assert(test, strangers, ast.Attribute)) is not None:
        return divided
    called = _called(test.code) & strangers
    function = test.function
    if not function:
        # A function of the program may have the name of a built-in one, but then nothing else may be in doubt.
        candidates = {name for name in called if name not in builtins.__dict__} or called
        function = candidates.pop() if len(candidates) == 1 else ""
    rest = {name for name in strangers if name != function and name not in builtins.__dict__}
    modules = {name for name in rest - called if name in sys.stdlib_module_names}
    if function and not rest - modules:
        exam = _exam(test.prelude, test.code, function, sorted(modules))
        return Plan(function, test.beside, exam, "", *_foreseen(test.code, function))
    if (divided := _divide_assert(test, strangers, ast.Name)) is not None:
        return divided
    if function:
        return Plan(obstacle=f"the test needs {sorted(rest - modules)} of the program besides {function!r}")
    return Plan(obstacle=f"it is not said which of {sorted(called)} the test is of")


def _alone(test: CodeTest, strangers: set[str]) -> tuple[str, str] | None:
    """What runs before the test needs anything of the program; None where that is nothing that could fail."""
    # The program's function may have the name of a built-in one.
    called = {test.function} if test.function else _called(test.code) & strangers
    needed = {name for name in strangers if name not in builtins.__dict__} | called
    head = list(itertools.takewhile(lambda statement: not _rests_on(statement, needed), ast.parse(test.code).body))
    if not head and (not test.prelude or test.prelude in PRELUDES):
        return None
    return test.prelude, ast.unparse(ast.Module(head, []))


def _rests_on(statement: ast.stmt, names: set[str]) -> bool:
    """Whether names, or the module that a program is, come up in a statement."""
    for node in ast.walk(statement):
        match node:
            case ast.Name(name) | ast.ImportFrom(name) if name in names or name == _PROGRAM:
                return True
            case ast.Import(modules) if any(module.name == _PROGRAM for module in modules):
                return True
    return False


def _foreseen(code: str, function: str) -> tuple[bytes, bytes | None]:
    """Questions and right answers of a test that only asserts that a call with constants equals a constant.

    Equal bytes are equal values; unequal bytes may be so too (1 and 1.0, or sets), so then the test is run on them.
    """
    *setup, last = ast.parse(code).body or [ast.Pass()]
    match last:
        case ast.Assert(ast.Compare(ast.Call(ast.Name(name)) as call, [ast.Eq()], [right])) if name == function:
            pass
        case _:
            return b"", None
    if not all(isinstance(part, ast.Import | ast.ImportFrom) for part in setup):
        return b"", None
    try:
        arguments = tuple(map(ast.literal_eval, call.args))
        keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
        expected = ast.literal_eval(right)
        question, answer = pack((arguments, keywords)), ["value", pack(expected)]
    except (ValueError, TypeError):
        return b"", None
    if len(keywords) < len(call.keywords):
        return b"", None
    return line(question).encode(), line(answer).encode()


def _divide_assert(test: CodeTest, strangers: set[str], kind: type[ast.expr]) -> Plan | None:
    """The plan for ``set up; assert f(...) == constant``, where the program's objects are needed on the left side.

    All but the constant runs beside the program.

    Args:
        kind: how the function is given, by name, or as an attribute as in ``Solution().f(...)``.
    """
    *setup, last = ast.parse(test.code).body or [ast.Pass()]
    match last:
        case ast.Assert(ast.Compare(ast.Call(called) as call, [ast.Eq()], [expected])) if isinstance(called, kind):
            needing = [called] if kind is ast.Name else [*setup, call]
        case _:
            return None
    names = {node.id for part in needing for node in ast.walk(part) if isinstance(node, ast.Name)}
    if not names & strangers - set(builtins.__dict__) - sys.stdlib_module_names:
        return None
    if any(isinstance(node, ast.Assert) for part in setup for node in ast.walk(part)) or not _is_constant(expected):
        return None
    asked = f"def {_ASKED}():\n    return {ast.unparse(call)}"
    beside = "\n".join([test.prelude, test.beside, *map(ast.unparse, setup), asked])
    code = f"assert {_ASKED}() == {ast.unparse(expected)}"
    return Plan(_ASKED, beside, _exam("", code, _ASKED, []), "", *_foreseen(code, _ASKED))


def _exam(prelude: str, code: str, function: str, modules: list[str]) -> bytes:
    return json.dumps({"prelude": prelude, "code": code, "function": function, "modules": modules}).encode()


def _is_constant(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError):
        return False
    return True


def _called(source: str) -> set[str]:
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {called.id for called in calls if isinstance(called, ast.Name)}


def _strangers(source: str) -> set[str]:
    """Names that are looked up outside of the source, built-in ones included."""
    top = symtable.symtable(source, "test.py", "exec")
    defined = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used = {
        symbol.get_name()
        for table in _tables(top)
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (symbol.is_global() or table is top)
    }
    return used - defined - {"__name__"}


def _tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _tables(child)
