"""The snippets that grading has a pool run. A jail does not hold this package, so they carry its text."""

import hashlib
import inspect
import marshal
import sys
from types import ModuleType

from jaxrl.sandbox.grading import answering, codec, examining

# Compiled here where the jail's interpreter is of the same version, for compiling would be half of a short call.
_LOAD = f"""
import marshal, sys, types

def load(name, source, compiled):
    module = sys.modules[name] = types.ModuleType(name)
    same = sys.hexversion == {sys.hexversion}
    exec(marshal.loads(compiled) if same else compile(source, name, "exec", dont_inherit=True), module.__dict__)
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
    loads = []
    for name, source in ((module.__name__, inspect.getsource(module)) for module in modules):
        compiled = marshal.dumps(compile(source, name, "exec", dont_inherit=True))
        loads.append(f"load({name!r}, {source!r}, {compiled!r})")
    return "\n".join([_LOAD, *loads])


_ANSWERING = _loading(codec, answering)
EXAMINE = f"{_loading(codec, examining)}.examine()"
# Of the way of grading. Made from the sources: compiled code is not the same bytes in every process.
VERSION = hashlib.sha256("".join(map(inspect.getsource, (codec, answering, examining))).encode()).hexdigest()
