"""Runs one snippet the way a notebook cell runs: last expression echoed, tracebacks of the snippet's own frames.

The last of our code in the process that the snippet gets, beside what prepared that process and what serves a session.
Nothing there decides a status: whatever the snippet does to this code, the warden judges by what the kernel reports.
"""

import _signal  # what `signal` wraps; its enumerations cost as much as the rest of a small cell
import _thread
import ast
import atexit
import builtins
import codecs
import contextlib
import linecache
import os
import random
import signal
import site
import sys
import threading
import traceback
import types
import zlib
from collections.abc import Callable

from jaxrl.sandbox import files
from jaxrl.sandbox.protocol import unpack_cells

FILENAME = "main.py"  # the name tracebacks show
LEFT_AT_ONCE = ".left-at-once"  # file that the last of a row of cells leaves behind where it ends the process itself

_WARM_UP = (
    b"print(1 + 1)",
    b"import random\ndef f(x):\n    return [y**2 for y in range(x)]\nclass C: pass\nf(3)",
    b"def f():\n    return {}['missing']\nf()",
    b"x = (",
)
# Counts as address space, touched or not: of the kernel's usual 8 MiB, 64 threads would use up the default limit. The
# deepest recursion that Python allows by default needs up to 2 MiB in 3.11 and up to 2.5 in 3.12 and 3.13.
_THREAD_STACK = 3 << 20
_SIGNALS = frozenset(map(int, signal.valid_signals()))
_WARM_ROUNDS = 12  # the interpreter rewrites code that has run eight times: once here rather than in every child


def prepare() -> None:
    """Once per template: names that interactive Python has, lossless printing, and a first run of everything below."""
    site.setquit()
    site.sethelper()
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.stderr.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.argv = [FILENAME]
    threading.stack_size(_THREAD_STACK)
    sys.dont_write_bytecode = True
    for _ in range(_WARM_ROUNDS):
        for snippet in _WARM_UP:
            run(snippet, flags=1)
    linecache.clearcache()


def run(source: bytes, flags: int) -> int:
    """Run the snippet to its end, threads and exit functions included, and return its exit code.

    Args:
        flags: 1 to echo a trailing expression, 2 if the source is a row of cells, each behind its files, of which the
            last is the snippet, and whether to echo it.
    """
    if flags & 2:
        code = _run_silently_but_last(unpack_cells(source))
    else:
        if source.find(b"import") >= 0:  # without one, nothing draws; ``in`` would raise and catch first
            seed(source)
        code = execute(source, bool(flags & 1))
    if _thread._count():
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    atexit._run_exitfuncs()
    flush()
    return code


def _run_silently_but_last(cells: list[bytes]) -> int:
    *earlier, last = zip(cells[::3], cells[1::3], cells[2::3], strict=True)
    work = os.getcwd()
    notebook = Notebook()
    really_leave, silent = os._exit, True

    def leave(code: int) -> None:
        if silent:
            raise SystemExit(code)  # an earlier cell must not take the later ones with it
        with contextlib.suppress(OSError):
            os.close(os.open(os.path.join(work, LEFT_AT_ONCE), os.O_CREAT | os.O_WRONLY))
        really_leave(code)

    os._exit = leave
    shown = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        os.dup2(nowhere, fd)
    for given, source, echo in earlier:
        notebook.run(source, any(echo), given, work)
    for fd, kept in zip((1, 2), shown, strict=True):
        os.dup2(kept, fd)
        os.close(kept)
    os.close(nowhere)
    silent = False
    given, source, echo = last
    return notebook.run(source, any(echo), given, work)


class Notebook:
    """Cells that share their names, one after the other: the state of a session."""

    def __init__(self) -> None:
        seed(b"")
        self._main = fresh_main()
        self._cells = 0
        self._blocked = _signal.pthread_sigmask(signal.SIG_BLOCK, ())  # by the cells themselves

    def run(self, source: bytes, echo: bool, given: bytes, directory: str) -> int:
        """Run the next cell, ``cell_N.py`` in tracebacks, and return its exit code; threads it started run on.

        Signals wait from one cell to the next: the handler that a cell set must not break into the code between them.

        Args:
            given: packed files, laid into the directory first; where that fails the cell fails.
        """

        def begin() -> None:
            _signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
            files.place(given, directory)

        self._cells += 1
        code = execute(source, echo, self._main, f"cell_{self._cells}.py", begin)
        flush()
        self._hold_signals()
        return code

    def _hold_signals(self) -> None:
        try:
            self._blocked = _signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        except BaseException:  # from the handler of one that came at the last moment; those after it wait
            _signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


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


def execute(
    code: bytes,
    echo: bool,
    module: types.ModuleType | None = None,
    filename: str = FILENAME,
    begin: Callable[[], None] | None = None,
) -> int:
    """Run the code; a trailing expression is echoed unless a semicolon ends it.

    Args:
        module: whose names it works on; None takes a fresh ``__main__``.
        filename: what tracebacks call it.
        begin: called first; what it raises counts as raised by the code.

    Returns:
        The exit code that an interpreter would end with.
    """
    if module is None:
        module = fresh_main(filename)
    try:
        if begin is not None:
            begin()
        source = code.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogatepass")
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
    try:
        text = f"{exit.code}\n"
    except BaseException as error:
        text = f"{type(error).__name__} in the text of an exit code\n"
    _complain(text)
    return 1


def _report(error: BaseException, filename: str) -> None:
    """The traceback in CPython's words, without the frames of this file."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != filename:
        frames = frames.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, frames))
    except BaseException:  # of an exception that cannot be shown
        text = f"{type(error).__name__}\n"
    _complain(text)


def _complain(text: str) -> None:
    """Print to stderr, also where the snippet has closed or replaced the stream."""
    try:
        sys.stderr.write(text)
    except BaseException:
        with contextlib.suppress(OSError):
            os.write(2, text.encode("utf-8", "backslashreplace"))


def seed(code: bytes) -> None:
    """The same snippet draws the same numbers on every run and machine; a warm template must not fix them for all."""
    seed = zlib.crc32(code)
    random.seed(seed)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(seed)
