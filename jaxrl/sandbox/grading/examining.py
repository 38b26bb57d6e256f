"""Run in the jail that holds the test and never the program: a stand-in takes the place of the tested function.

The stand-in writes down what it is asked. As long as the answers are known, the test runs on them and its asserts
count. From the first question on whose answer is not known it runs on blindly, with a value that goes along with
everything, only to learn what else would be asked.
"""

import ast
import builtins
import importlib
import json
import traceback
from typing import Any

from jaxrl.sandbox.grading.codec import ANSWERS, EXAM, QUESTIONS, VERDICT, NotData, line, lines, pack, unpack

_MOST_ASKED_BLINDLY = 1000  # a loop that only an answer ends
_SELF = "_jaxrl_examination"


class Unknown:
    """The answer to a question that has not been put to the program yet."""

    def __float__(self) -> float:
        return 1.0

    def __int__(self) -> int:
        return 1

    __index__ = __int__

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> "Unknown":
        return self

    def __next__(self) -> "Unknown":
        raise StopIteration

    def __getattr__(self, name: str) -> "Unknown":
        return self

    def __hash__(self) -> int:
        return 1


def _same(self: Unknown, *_: object) -> Unknown:
    return self


_PLAIN = ("abs", "call", "invert", "neg", "pos", "getitem", "setitem", "eq", "ne", "lt", "le", "gt", "ge")
_BINARY = ("add", "and", "floordiv", "matmul", "mod", "mul", "or", "pow", "sub", "truediv", "xor")
for _name in (*_PLAIN, *_BINARY, *("r" + name for name in _BINARY)):
    setattr(Unknown, f"__{_name}__", _same)


class Stranger:
    """Stands for an object of the program that is no plain data: equal to itself only, and as true as that was."""

    def __init__(self, name: str, truth: object) -> None:
        self._name, self._truth = name, truth is True

    def __bool__(self) -> bool:
        return self._truth

    def __repr__(self) -> str:
        return f"<{self._name}>"


class EnoughAsked(BaseException):
    """The next questions rest on answers that are not known."""


class NotAskable(BaseException):
    """An argument is no plain data, so no question can carry it."""


class Examination:
    """One run of a test.

    Args:
        asked: questions already put to the program, as text; no two values have the same, and NaN has its own.
        answers: what it wrote in reply, as read from JSON; anything at all may stand there.
    """

    def __init__(self, asked: list[str], answers: list[Any]) -> None:
        self._known = list(zip(asked, answers, strict=False))
        self.questions: list[str] = []
        self.blind = False
        self._asked_blindly = 0
        self.raised: BaseException | None = None  # what the program's function raised last

    def ask(self, *arguments: object, **keywords: object) -> Any:
        """What the test calls in place of the program's function."""
        try:
            question = line(pack((arguments, keywords)))
        except NotData as error:
            raise EnoughAsked if isinstance(error.value, Unknown) else NotAskable(str(error)) from error
        number = len(self.questions)
        self.questions.append(question)
        if self.blind or number >= len(self._known) or self._known[number][0] != question:
            self.blind = True
            self._asked_blindly += 1
            if self._asked_blindly > _MOST_ASKED_BLINDLY:
                raise EnoughAsked
            return Unknown()
        kind, *answer = self._known[number][1]
        if kind == "value":
            return unpack(answer[0])
        if kind == "object":
            return Stranger(*answer)
        name, arguments_raised = answer
        found = getattr(builtins, name)
        if not issubclass(found, Exception):
            raise TypeError(f"{name} is no exception")
        self.raised = found.__new__(found, *unpack(arguments_raised))
        raise self.raised


class _LenientAsserts(ast.NodeTransformer):
    """Makes an assert that fails blindly no reason to stop."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        handler = ast.parse(f"try: pass\nexcept Exception:\n    if not {_SELF}.blind: raise").body[0]
        handler.body = [node]
        return ast.copy_location(handler, node)


def run_test(exam: dict, examination: Examination) -> tuple[str, str]:
    """Run the test once.

    Returns:
        A word and what is to be said about it: "passed"; "failed", an assert did not hold or the test broke; "raised",
        it ended with what the program's function raised; "more", there are questions without an answer; "closed",
        it has a question that cannot be put.
    """
    try:
        namespace: dict[str, Any] = {"__name__": "test", _SELF: examination}
        for name in exam["modules"]:
            namespace[name] = importlib.import_module(name)
        exec(compile(exam["prelude"], "prelude.py", "exec", dont_inherit=True), namespace)
        namespace[exam["function"]] = examination.ask
        tree = ast.fix_missing_locations(_LenientAsserts().visit(ast.parse(exam["code"])))
        exec(compile(tree, "test.py", "exec", dont_inherit=True), namespace)
    except EnoughAsked:
        pass
    except NotAskable as error:
        return "closed", str(error)
    except BaseException as error:
        if not examination.blind:
            return "raised" if error is examination.raised else "failed", _described(error, exam["code"])
    return ("more", "") if examination.blind else ("passed", "")


def _described(error: BaseException, code: str) -> str:
    """The exception, and the line of the test where it came up."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "test.py"]
    where = f" at: {code.splitlines()[lines[-1] - 1].strip()}" if lines else ""
    return f"{type(error).__name__}: {error}{where}"


def examine() -> None:
    """Read exam, questions and answers; write the verdict and the questions of this run."""
    exam = json.loads(_read(EXAM))
    asked = _read(QUESTIONS).decode().splitlines(keepends=True)
    try:
        answers = lines(_read(ANSWERS))
    except (ValueError, RecursionError) as error:
        word, text = "failed", f"the program's answers cannot be read: {error}"
    else:
        examination = Examination(asked, answers)
        word, text = run_test(exam, examination)
        asked = examination.questions
    with open(QUESTIONS, "w", encoding="utf-8") as file:
        file.writelines(asked)
    with open(VERDICT, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{word}\n{text}")


def _read(name: str) -> bytes:
    with open(name, "rb") as file:
        return file.read()
