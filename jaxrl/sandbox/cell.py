"""Runs one snippet the way a notebook cell runs: last expression echoed, tracebacks of the snippet's own frames.

This is the only file whose code shares a process with the snippet. Nothing here decides a status: whatever the
snippet does to this code, the warden judges by what the kernel reports.
"""

import _thread
import ast
import atexit
import builtins
import linecache
import random
import site
import sys
import threading
import traceback
import types
import zlib

FILENAME = "main.py"  # the name tracebacks show

_WARM_UP = (
    b"print(1 + 1)",
    b"import random\ndef f(x):\n    return [y**2 for y in range(x)]\nclass C: pass\nf(3)",
    b"def f():\n    return {}['missing']\nf()",
    b"x = (",
)
_WARM_ROUNDS = 12  # the interpreter rewrites code that has run eight times: once here rather than in every child


def prepare() -> None:
    """Once per template: names that interactive Python has, lossless printing, and a first run of everything below."""
    site.setquit()
    site.sethelper()
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.stderr.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.argv = [FILENAME]
    sys.dont_write_bytecode = True
    for _ in range(_WARM_ROUNDS):
        for snippet in _WARM_UP:
            run(snippet, echo=True)
    linecache.clearcache()


def run(source: bytes, echo: bool) -> int:
    """Run the snippet to its end, threads and exit functions included, and return its exit code."""
    if b"import" in source:  # without one, nothing draws
        _seed(source)
    code = execute(source, echo)
    if _thread._count():
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # closed or replaced by the snippet
            continue
    return code


def execute(code: bytes, echo: bool) -> int:
    """Run the code in a fresh ``__main__``; a trailing expression is echoed unless a semicolon ends it."""
    module = types.ModuleType("__main__")
    module.__file__ = FILENAME
    module.__builtins__ = builtins
    sys.modules["__main__"] = module
    try:
        source = code.decode("utf-8", "surrogatepass")
        linecache.cache[FILENAME] = (len(source), None, source.splitlines(keepends=True), FILENAME)
        for part in _compiled(source, echo):
            exec(part, module.__dict__)
        return 0
    except SystemExit as exit:
        return _exit_code(exit)
    except BaseException as error:
        _report(error)
        return 1


def _compiled(source: str, echo: bool) -> list[types.CodeType]:
    if not echo or source.rstrip().endswith(";"):
        return [compile(source, FILENAME, "exec", dont_inherit=True)]
    if "\n" not in source and ";" not in source and ":" not in source:  # a simple statement, which needs no tree
        try:
            return [compile(source, FILENAME, "single", dont_inherit=True)]
        except SyntaxError:
            pass  # raised again below, in the words for a file
    tree = compile(source, FILENAME, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
    if not tree.body or not isinstance(tree.body[-1], ast.Expr):
        return [compile(tree, FILENAME, "exec", dont_inherit=True)]
    last = ast.Interactive([tree.body.pop()])
    parts = [compile(last, FILENAME, "single", dont_inherit=True)]
    if tree.body:
        parts.insert(0, compile(tree, FILENAME, "exec", dont_inherit=True))
    return parts


def _exit_code(exit: SystemExit) -> int:
    """As the interpreter does: None is 0, a number itself, anything else is printed and 1."""
    if exit.code is None:
        return 0
    if isinstance(exit.code, int):
        return exit.code & 0xFF
    print(exit.code, file=sys.stderr)
    return 1


def _report(error: BaseException) -> None:
    """The traceback in CPython's words, without the frames of this file."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != FILENAME:
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames, file=sys.stderr)


def _seed(code: bytes) -> None:
    """The same snippet draws the same numbers on every run and machine; a warm template must not fix them for all."""
    seed = zlib.crc32(code)
    random.seed(seed)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(seed)
