"""Fewer memory mappings, because a fork copies each of them and every call is a fork.

The loader maps a shared library in five pieces with different rights; two are enough, and make the fork of a bare
interpreter an eighth cheaper (measured). Rights within a template protect nothing: what a snippet may not do is
forbidden by the walls, and it can call ``mprotect`` itself.
"""

import ctypes
import mmap

_PT_LOAD, _PT_GNU_RELRO = 1, 0x6474E552
_WRITABLE = 2  # PF_W of a program header
_PAGES = -mmap.PAGESIZE
_READ_WRITE, _READ_EXECUTE = mmap.PROT_READ | mmap.PROT_WRITE, mmap.PROT_READ | mmap.PROT_EXEC


class _Header(ctypes.Structure):
    """ElfW(Phdr), elf(5), 64 bits."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("physical", ctypes.c_uint64),
        ("file_size", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("alignment", ctypes.c_uint64),
    )


class _Library(ctypes.Structure):
    """The first fields of struct dl_phdr_info, dl_iterate_phdr(3)."""

    _fields_ = (
        ("base", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("headers", ctypes.POINTER(_Header)),
        ("count", ctypes.c_uint16),
    )


def merge() -> None:
    """Give the pieces of every loaded library the same rights where they may then become one mapping.

    Constants join the code, and the tables that the loader has protected join the other data. Call this before the
    first fork: later the kernel keeps them apart. Where it refuses, everything stays as it was, only dearer.
    """
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    for constant, start, end in _pieces(libc):
        libc.mprotect(start, end - start, _READ_EXECUTE if constant else _READ_WRITE)


def _pieces(libc: ctypes.CDLL) -> list[tuple[bool, int, int]]:
    """(holds code or constants, first address, end) of what is to be joined, of every library."""
    found: list[tuple[bool, int, int]] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Library), ctypes.c_size_t, ctypes.c_void_p)
    def look(library, size, data) -> int:
        base = library.contents.base
        for header in library.contents.headers[: library.contents.count]:
            start, end = base + header.address, base + header.address + header.size
            if header.type == _PT_LOAD and not header.flags & _WRITABLE:
                found.append((True, start & _PAGES, end + mmap.PAGESIZE - 1 & _PAGES))
            elif header.type == _PT_GNU_RELRO:
                found.append((False, start & _PAGES, end & _PAGES))
        return 0

    libc.dl_iterate_phdr(look, None)
    return found
