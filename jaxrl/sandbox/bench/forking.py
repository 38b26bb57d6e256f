"""A template's image, and in it nothing but fork, exec of the snippet, pipe and exit."""

import json
import os
import resource
import sys
from typing import NoReturn

from jaxrl.sandbox import forks

forks.defer_hooks()

from jaxrl.sandbox import cell, mappings, zygote  # noqa: E402 - what registers hooks comes after


def main(arguments: list[str]) -> None:
    """Arguments: the folder of the packages, and the modules to load. Answers a line of JSON (code, forks) with
    the CPU seconds per fork."""
    packages, *modules = arguments
    sys.path.append(packages)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    mappings.merge()
    cell.prepare()
    forks.settle_heap()
    _go_on_in_child()  # as deep as the templates are
    if modules:
        zygote.load(modules)
        forks.settle_heap()
        _go_on_in_child()
    for line in sys.stdin:
        code, count = json.loads(line)
        before = _spent()
        for _ in range(count):
            _fork(code)
        print((_spent() - before) / count, file=answers)


def _go_on_in_child() -> None:
    if os.fork():
        os.wait()
        os._exit(0)


def _fork(code: str) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        _run(code, writer)
    os.close(writer)
    while os.read(reader, 1 << 16):
        pass
    os.close(reader)
    os.waitpid(pid, 0)


def _run(code: str, writer: int) -> NoReturn:
    os.dup2(writer, 1)
    exec(compile(code, cell.FILENAME, "exec"), {})
    sys.stdout.flush()
    os._exit(0)


def _spent() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(each.ru_utime + each.ru_stime for each in usage)
