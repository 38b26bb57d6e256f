"""Fewer memory mappings and fewer pages in them, because a fork copies each of them and every call is a fork.

The loader maps a shared library in five pieces with different rights; two are enough, and make the fork of a bare
interpreter an eighth cheaper (measured). Rights within a template protect nothing: what a snippet may not do is
forbidden by the walls, and it can call ``mprotect`` itself.
"""

import ctypes
import mmap

HUGE_PAGE = mmap.PAGESIZE * (mmap.PAGESIZE // 8)  # what one page of a page table maps: 2 MiB for pages of 4 KiB
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
_MAYMOVE, _FIXED = 1, 2  # MREMAP_
_FAILED = (1 << 64) - 1
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


def enlarge_code_pages() -> None:
    """Put the interpreter's code on huge pages, with which a child is born; else it finds each page by a fault.

    For a process with one thread, after ``merge``. The code is then memory of this process and its forks, no longer of
    the file. Where there are no huge pages, or no memory may become code, it stays where it is.
    """
    libc = ctypes.CDLL(None)
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mremap.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_size_t]
    libc.mprotect.argtypes = libc.madvise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    libc.mmap.restype = libc.mremap.restype = ctypes.c_size_t
    for first, end in _whole_blocks(libc):
        size = end - first
        anonymous = libc.mmap(None, size + HUGE_PAGE, _READ_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if anonymous == _FAILED:
            return
        copy = _up(anonymous)
        libc.madvise(copy, size, MADV_HUGEPAGE)
        ctypes.memmove(copy, first, size)
        huge = libc.madvise(copy, size, MADV_COLLAPSE) == 0 and libc.mprotect(copy, size, _READ_EXECUTE) == 0
        # The copy takes the place of the code in one step. Rights come last: at that the kernel makes it fit to run.
        if not huge or libc.mremap(copy, size, size, _MAYMOVE | _FIXED, first) == _FAILED:
            libc.munmap(copy, size)
        libc.munmap(anonymous, copy - anonymous)
        libc.munmap(copy + size, anonymous + HUGE_PAGE - copy)


def _whole_blocks(libc: ctypes.CDLL) -> list[tuple[int, int]]:
    """(first address, end) of the huge pages that lie wholly within code and constants."""
    joined: list[list[int]] = []
    for start, end in sorted((start, end) for constant, start, end in _pieces(libc) if constant):
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    blocks = [(_up(start), end & -HUGE_PAGE) for start, end in joined]
    return [(start, end) for start, end in blocks if start < end]


def _up(address: int) -> int:
    return -(-address // HUGE_PAGE) * HUGE_PAGE


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
