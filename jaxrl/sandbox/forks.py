"""Makes forking cheap: at-fork hooks put aside, and the heap on huge pages.

What modules register to run around a fork repairs locks that another thread might hold. A template has one thread,
so for it that work is in vain, and it would cost a tenth of a trivial call.
"""

import ctypes
import gc
import os
from collections.abc import Callable

from jaxrl.sandbox.mappings import HUGE_PAGE, MADV_COLLAPSE, MADV_HUGEPAGE

_register = os.register_at_fork
_hooks: list[dict[str, Callable[[], None]]] = []


def defer_hooks() -> None:
    """Remember hooks instead of registering them; call this before importing what registers any."""
    os.register_at_fork = _remember


def _remember(**hooks: Callable[[], None]) -> None:
    _hooks.append(hooks)


def restore_registration() -> None:
    """Let snippets register hooks as usual."""
    os.register_at_fork = _register


def register_hooks() -> None:
    """For a child that may fork itself: what ``defer_hooks`` put aside."""
    for hooks in _hooks:
        _register(**hooks)


def settle_heap() -> None:
    """Before the first fork: garbage away, what is left never collected again, its memory on huge pages.

    The cost of a fork is mostly its page table; huge pages halve that of an interpreter with large libraries
    (measured with numpy, scipy and sympy). A kernel that cannot do it (before 6.1) is left as it is.
    """
    gc.collect()
    regions = {id(thing) & -HUGE_PAGE for thing in gc.get_objects()}
    gc.freeze()
    gc.disable()
    libc = ctypes.CDLL(None)
    for region in regions:
        for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
            libc.madvise(ctypes.c_void_p(region), ctypes.c_size_t(HUGE_PAGE), advice)
