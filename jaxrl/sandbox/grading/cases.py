"""What a program can be tested with."""

import ast
import dataclasses
import inspect
import keyword
from collections.abc import Mapping, Sequence

from jaxrl.sandbox import arguments, languages
from jaxrl.sandbox.grading import closeness
from jaxrl.sandbox.grading.codec import pack


@dataclasses.dataclass(frozen=True)
class StdioTest:
    """The program is run whole; what it prints is compared."""

    stdin: str | bytes
    expected: str
    """White space at the end of a line and empty lines at the end do not count."""
    tolerance: float | None = None
    """If given, words that are numbers may be off by so much, relatively or absolutely, and spacing does not count."""
    language: str = "python"
    """Of the program, as the pool names it."""

    def __post_init__(self) -> None:
        arguments.kind("StdioTest.stdin", self.stdin, (str, bytes), "str or bytes")
        arguments.kind("StdioTest.expected", self.expected, str, "str")
        _check_tolerance("StdioTest.tolerance", self.tolerance)
        arguments.kind("StdioTest.language", self.language, str, "the name of a language")
        if self.language != "python" and self.language not in languages.LANGUAGES:
            known = ", ".join(["python", *languages.LANGUAGES])
            raise ValueError(f"StdioTest.language={self.language!r} is not known; choose one of {known}")

    def accepts(self, printed: str) -> bool:
        """Whether this output is the expected one."""
        if _trimmed(printed) == _trimmed(self.expected):
            return True
        if self.tolerance is None:
            return False
        words, wanted = printed.split(), self.expected.split()
        return len(words) == len(wanted) and all(map(self._same_word, words, wanted))

    def _same_word(self, word: str, wanted: str) -> bool:
        try:
            return word == wanted or closeness.close(float(word), float(wanted), self.tolerance or 0.0)
        except ValueError:
            return False


@dataclasses.dataclass(frozen=True)
class CodeTest:
    """Python that passes if it raises nothing: asserts as of MBPP, or HumanEval's ``check`` and a call of it."""

    code: str
    function: str = ""
    """Name of the program's function that the code calls; empty finds it where the code calls only one stranger."""
    prelude: str = ""
    """Helpers of the code. A program that defines the same names does not alter them."""
    beside: str = ""
    """Runs after the program, in its module, and may define the function. The program sees it: no answers here."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            arguments.kind(f"CodeTest.{name}", value, str, "str")
        if all(not line or line.startswith("#") for line in map(str.strip, self.code.splitlines())):
            raise ValueError(f"CodeTest.code={self.code!r} tests nothing; give an assert, or what else raises")
        if self.function and (not self.function.isidentifier() or keyword.iskeyword(self.function)):
            raise ValueError(f"CodeTest.function={self.function!r} is no name of a function; give one, or none")
        for name in ("prelude", "code"):
            try:
                ast.parse(getattr(self, name))
            except (SyntaxError, ValueError) as error:
                raise ValueError(f"CodeTest.{name} is no Python: {error}; mend it, or leave the test out") from None


@dataclasses.dataclass(frozen=True)
class CallTest:
    """One call of the program's function; what it returns is compared.

    Raises:
        NotData: an argument or the expected value is no plain data.
    """

    function: str
    """Its name, or an expression for it such as ``Solution().solve``."""
    arguments: Sequence[object]
    expected: object
    keywords: Mapping[str, object] = dataclasses.field(default_factory=dict)
    tolerance: float | None = None
    """If given, numbers may be off by so much, relatively or absolutely, inside lists, tuples and dictionaries too."""

    def __post_init__(self) -> None:
        arguments.kind("CallTest.function", self.function, str, "the function's name, or an expression for it")
        arguments.kind("CallTest.arguments", self.arguments, (list, tuple), "a list or tuple of the call's arguments")
        arguments.kind("CallTest.keywords", self.keywords, Mapping, "a mapping from name to value")
        _check_tolerance("CallTest.tolerance", self.tolerance)
        pack([list(self.arguments), dict(self.keywords), self.expected])
        if not _can_be_called(self.function):
            raise ValueError(
                f"CallTest.function={self.function!r} is no name of a function; give 'solve', or what leads to it as"
                " 'Solution().solve'"
            )
        for name in self.keywords:
            if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
                raise ValueError(f"CallTest.keywords names {name!r}, which is no name of an argument; rename it")

    def as_code(self) -> CodeTest:
        """The same test as an assert; ``repr`` of plain data is Python."""
        arguments = [repr(argument) for argument in self.arguments]
        arguments += [f"{name}={value!r}" for name, value in self.keywords.items()]
        function, beside = self.function, ""
        if not function.isidentifier():
            function = "_jaxrl_called"
            beside = f"def {function}(*arguments, **keywords):\n    return {self.function}(*arguments, **keywords)"
        call = f"{function}({', '.join(arguments)})"
        if self.tolerance is None:
            return CodeTest(f"assert {call} == {self.expected!r}", function, PRELUDES[0], beside)
        compared = f"assert _close({call}, {self.expected!r}, {self.tolerance!r})"
        return CodeTest(compared, function, PRELUDES[1], beside)


_NAMES = "from decimal import Decimal\nfrom fractions import Fraction\nfrom math import inf, nan"
PRELUDES = (_NAMES, f"{_NAMES}\n{inspect.getsource(closeness)}\n_close = close")  # of calls; known to run

Test = StdioTest | CallTest | CodeTest


def _can_be_called(function: str) -> bool:
    """Whether this is a name, or a path of attributes, calls and items that begins with one."""
    try:
        call = ast.parse(f"{function}()", mode="eval").body
    except (SyntaxError, ValueError):
        return False
    if not isinstance(call, ast.Call) or call.args or call.keywords or not function:
        return False
    return isinstance(call.func, ast.Name | ast.Attribute | ast.Call | ast.Subscript)


def _check_tolerance(name: str, tolerance: object) -> None:
    if tolerance is not None:
        arguments.number(name, tolerance)
        if not tolerance >= 0:
            raise ValueError(f"{name}={tolerance} must not be negative; None compares exactly")


def _trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
