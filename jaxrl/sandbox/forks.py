"""Makes forking cheap: at-fork hooks put aside, and the heap on huge pages.

What modules register to run around a fork repairs locks that another thread might hold. A template has one thread,
so for it that work is in vain, and it would cost a tenth of a trivial call.
"""

import ctypes
import gc
import os
from collections.abc import Callable

_HUGE_SHIFT = 21  # huge pages of 2 MiB
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25

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
    regions = {id(thing) >> _HUGE_SHIFT for thing in gc.get_objects()}
    gc.freeze()
    gc.disable()
    libc = ctypes.CDLL(None)
    size = 1 << _HUGE_SHIFT
    for region in regions:
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            libc.madvise(ctypes.c_void_p(region << _HUGE_SHIFT), ctypes.c_size_t(size), advice)
