"""Runs one snippet the way a notebook cell runs: last expression echoed, tracebacks of the snippet's own frames.

This is the only file whose code shares a process with the snippet. Nothing here decides a status: whatever the
snippet does to this code, the warden judges by what the kernel reports.
"""

import _thread
import ast
import atexit
import builtins
import linecache
import os
import random
import site
import sys
import threading
import traceback
import types
import zlib

from jaxrl.sandbox import files
from jaxrl.sandbox.protocol import unpack_cells

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
            run(snippet, flags=1)
    linecache.clearcache()


def run(source: bytes, flags: int) -> int:
    """Run the snippet to its end, threads and exit functions included, and return its exit code.

    Args:
        flags: 1 to echo a trailing expression, 2 if the source is a row of cells, each behind its files, of which the
            last is the snippet.
    """
    if flags & 2:
        code = _run_silently_but_last(unpack_cells(source), bool(flags & 1))
    else:
        if b"import" in source:  # without one, nothing draws
            seed(source)
        code = execute(source, bool(flags & 1))
    if _thread._count():
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    atexit._run_exitfuncs()
    flush()
    return code


def _run_silently_but_last(cells: list[bytes], echo: bool) -> int:
    notebook = Notebook()
    leave, os._exit = os._exit, sys.exit  # an earlier cell that left at once must not take the later ones with it
    shown = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        os.dup2(nowhere, fd)
    for given, source in zip(cells[0:-2:2], cells[1:-2:2], strict=True):
        files.place(given)
        notebook.run(source, echo)
    for fd, kept in zip((1, 2), shown, strict=True):
        os.dup2(kept, fd)
        os.close(kept)
    os.close(nowhere)
    os._exit = leave
    files.place(cells[-2])
    return notebook.run(cells[-1], echo)


class Notebook:
    """Cells that share their names, one after the other: the state of a session."""

    def __init__(self) -> None:
        seed(b"")
        self._main = fresh_main()
        self._cells = 0

    def run(self, source: bytes, echo: bool) -> int:
        """Run the next cell, ``cell_N.py`` in tracebacks, and return its exit code; threads it started run on."""
        self._cells += 1
        code = execute(source, echo, self._main, f"cell_{self._cells}.py")
        flush()
        return code


def flush() -> None:
    """Bring out what the snippet printed, whatever it did to the streams."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # closed or replaced by the snippet
            continue


def fresh_main(filename: str = FILENAME) -> types.ModuleType:
    """An empty ``__main__``, put in the place of the present one."""
    module = types.ModuleType("__main__")
    module.__file__ = filename
    module.__builtins__ = builtins
    sys.modules["__main__"] = module
    return module


def execute(code: bytes, echo: bool, module: types.ModuleType | None = None, filename: str = FILENAME) -> int:
    """Run the code; a trailing expression is echoed unless a semicolon ends it.

    Args:
        module: whose names it works on; None takes a fresh ``__main__``.
        filename: what tracebacks call it.

    Returns:
        The exit code that an interpreter would end with.
    """
    if module is None:
        module = fresh_main(filename)
    try:
        source = code.decode("utf-8", "surrogatepass")
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        for part in _compiled(source, echo, filename):
            exec(part, module.__dict__)
        return 0
    except SystemExit as exit:
        return _exit_code(exit)
    except BaseException as error:
        _report(error, filename)
        return 1


def _compiled(source: str, echo: bool, filename: str) -> list[types.CodeType]:
    if not echo or source.rstrip().endswith(";"):
        return [compile(source, filename, "exec", dont_inherit=True)]
    if "\n" not in source and ";" not in source and ":" not in source:  # a simple statement, which needs no tree
        try:
            return [compile(source, filename, "single", dont_inherit=True)]
        except SyntaxError:
            pass  # raised again below, in the words for a file
    tree = compile(source, filename, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
    if not tree.body or not isinstance(tree.body[-1], ast.Expr):
        return [compile(tree, filename, "exec", dont_inherit=True)]
    last = ast.Interactive([tree.body.pop()])
    parts = [compile(last, filename, "single", dont_inherit=True)]
    if tree.body:
        parts.insert(0, compile(tree, filename, "exec", dont_inherit=True))
    return parts


def _exit_code(exit: SystemExit) -> int:
    """As the interpreter does: None is 0, a number itself, anything else is printed and 1."""
    if exit.code is None:
        return 0
    if isinstance(exit.code, int):
        return exit.code & 0xFF
    print(exit.code, file=sys.stderr)
    return 1


def _report(error: BaseException, filename: str) -> None:
    """The traceback in CPython's words, without the frames of this file."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != filename:
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames, file=sys.stderr)


def seed(code: bytes) -> None:
    """The same snippet draws the same numbers on every run and machine; a warm template must not fix them for all."""
    seed = zlib.crc32(code)
    random.seed(seed)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(seed)
