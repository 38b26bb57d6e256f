"""The snippets that grading has a pool run. A jail does not hold this package, so they carry its text."""

import hashlib
import inspect
from types import ModuleType

from jaxrl.sandbox.grading import answering, codec, examining

_LOAD = """
import sys, types

def load(name, source):
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
    return module
"""


def answer(program: str, beside: str, function: str) -> str:
    """Load the program and what runs after it; call the function as ``QUESTIONS`` says, write ``ANSWERS``."""
    return f"{_ANSWERING}.answer({program!r}, {beside!r}, {function!r})"


def stand_beside(program: str, prelude: str, test: str, token: str) -> str:
    """Run program and test together; the token becomes ``ANSWERS`` if neither raises."""
    return f"{_ANSWERING}.stand_beside({program!r}, {prelude!r}, {test!r}, {token!r})"


def _loading(*modules: ModuleType) -> str:
    """Source that loads modules from their own source; it ends with an expression that is the last of them."""
    loads = [f"load({module.__name__!r}, {inspect.getsource(module)!r})" for module in modules]
    return "\n".join([_LOAD, *loads])


_ANSWERING = _loading(codec, answering)
EXAMINE = f"{_loading(codec, examining)}.examine()"
VERSION = hashlib.sha256((_ANSWERING + EXAMINE).encode()).hexdigest()  # of the way of grading
