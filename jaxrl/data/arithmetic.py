"""A tiny interpreter of arithmetic programs, for what a Python tool would answer while demonstrations are made.

Assignments to names and arithmetic on numbers, and nothing else: programs built from data files are run here, so
nothing in them may reach Python itself.
"""

import ast
import dataclasses
import operator
import traceback
import warnings
from collections.abc import Callable

Number = int | float
_LARGEST = 10**15  # beyond it floats lose integers, and powers grow without bound

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class UnsupportedProgram(ValueError):
    """Code that is more than assignments and arithmetic of moderate size."""


@dataclasses.dataclass(frozen=True)
class Output:
    """What the tool would show: the value of the last expression, or the last line of the traceback."""

    text: str
    value: Number | None = None
    """The last expression's value; None when there is none or the program failed."""
    failed: bool = False


def run(code: str) -> Output:
    """Run an arithmetic program and echo its last expression, as the Python tool does.

    Syntax errors, undefined names and divisions by zero come out in Python's own words, e.g.
    ``NameError: name 'x' is not defined``.

    Raises:
        UnsupportedProgram: the program holds anything but arithmetic, or numbers beyond 1e15.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "5x" and the like warn before they fail
            program = ast.parse(code)
        return _execute(program)
    except (SyntaxError, NameError, ZeroDivisionError) as error:
        return Output(traceback.format_exception_only(error)[-1].strip(), failed=True)
    except (RecursionError, MemoryError) as error:
        raise UnsupportedProgram(f"program of {len(code)} characters nests too deeply") from error


def _execute(program: ast.Module) -> Output:
    names: dict[str, Number] = {}
    value: Number | None = None
    for statement in program.body:
        value = None
        if isinstance(statement, ast.Expr):
            value = _evaluate(statement.value, names)
        elif isinstance(statement, ast.Assign) and all(isinstance(target, ast.Name) for target in statement.targets):
            assigned = _evaluate(statement.value, names)
            names.update({target.id: assigned for target in statement.targets if isinstance(target, ast.Name)})
        else:
            raise UnsupportedProgram(f"{type(statement).__name__} is not arithmetic")
    return Output("" if value is None else repr(value), value)


def _evaluate(node: ast.expr, names: dict[str, Number]) -> Number:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        result: Number = node.value
    elif isinstance(node, ast.Name):
        if node.id not in names:
            raise NameError(f"name '{node.id}' is not defined")
        result = names[node.id]
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        result = _BINARY[type(node.op)](_evaluate(node.left, names), _evaluate(node.right, names))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        result = _power(_evaluate(node.left, names), _evaluate(node.right, names))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        result = _UNARY[type(node.op)](_evaluate(node.operand, names))
    else:
        raise UnsupportedProgram(f"{type(node).__name__} is not arithmetic")
    if not abs(result) <= _LARGEST:
        raise UnsupportedProgram(f"a value beyond {_LARGEST:.0e}")
    return result


def _power(base: Number, exponent: Number) -> Number:
    if not (0 <= exponent <= 50 and 0 <= base <= 1000):
        raise UnsupportedProgram(f"power {base}**{exponent}: base must lie in 0..1000 and exponent in 0..50")
    return base**exponent
