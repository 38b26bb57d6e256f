"""Run in the jail that holds the program: calls its function with the arguments asked about, writes what came back.

Nothing here is a secret of the test's, and nothing is believed: a program that rewrites all of it can give itself other
answers, none that its function could not have returned.
"""

import builtins
import os
import sys
import types
from collections.abc import Callable

from jaxrl.sandbox.grading.codec import ANSWERS, QUESTIONS, NotData, line, lines, pack, unpack


def answer(program: str, beside: str, function: str) -> None:
    """Load the program and what runs after it as one module, and answer every question, in order, in one process.

    Raises:
        BaseException: whatever loading the program raises.
    """
    with open(QUESTIONS, "rb") as file:
        questions = lines(file.read())
    # A line at a time: what is answered counts, even if a later question takes too long that the test would not ask.
    with open(ANSWERS, "w", encoding="utf-8", buffering=1) as file:
        called = getattr(load(program, beside), function)
        for question in questions:
            arguments, keywords = unpack(question)
            file.write(line(_answer(called, arguments, keywords)))


def _answer(called: Callable, arguments: tuple, keywords: dict) -> list:
    """The value where it is plain data; of any other object what it is and whether it is true; or what was raised."""
    try:
        value = called(*arguments, **keywords)
        try:
            return ["value", pack(value)]
        except NotData:
            return ["object", type(value).__name__, bool(value)]
    except MemoryError:
        raise
    except Exception as error:
        return ["raised", *_described(error)]


def load(*sources: str) -> types.ModuleType:
    """Run sources one after another in a module that is not the main one, so that main blocks do not run."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    for source in sources:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    return module


def _described(error: Exception) -> tuple[str, object]:
    """The nearest built-in class of an exception, and its arguments where they are plain data."""
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == builtins.__name__)
    try:
        return name, pack(error.args)
    except NotData:
        return name, pack(())


def stand_beside(program: str, prelude: str, test: str, token: str) -> None:
    """Run program and test in one module, for tests that cannot be kept apart; write the token if none raised."""
    path = os.path.abspath(ANSWERS)
    load(prelude, program, test)
    with open(path, "w", encoding="utf-8") as file:
        file.write(token)
