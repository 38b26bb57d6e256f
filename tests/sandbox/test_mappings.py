"""Merged mappings, and code on huge pages: less for a fork to copy, and libraries that still work."""

import pathlib
import subprocess
import sys

import pytest

from tests.sandbox.driver import Driver

CODE = """
import ctypes, decimal, json, lzma, math, select, socket, ssl, zlib
from jaxrl.sandbox import mappings

def count():
    return sum(".so" in line for line in open("/proc/self/maps"))

before = count()
mappings.merge()
print(before, count())
assert zlib.decompress(zlib.compress(b"abc" * 100)) == b"abc" * 100 and lzma.decompress(lzma.compress(b"x")) == b"x"
assert str(decimal.Decimal(1) / 7).startswith("0.142857") and math.sin(0.0) == 0.0
ctypes.CDLL(None).getpid()
"""

ON_HUGE_PAGES = """
import ctypes, decimal, json, mmap, os, re
from jaxrl.sandbox import mappings

def executable():
    lines = [line.split() for line in open("/proc/self/maps") if "x" in line.split()[1]]
    return [(*(int(part, 16) for part in line[0].split("-")), line[1:]) for line in lines]

def pages():
    return int(open("/proc/self/statm").read().split()[0])

def up(address):
    return address + -address % mappings.HUGE_PAGE

def huge_kib():
    # of executable memory that no file backs
    total, here = 0, False
    for line in open("/proc/self/smaps"):
        fields = line.split()
        if "-" in fields[0]:
            here = "x" in fields[1] and len(fields) == 5
        elif here and fields[0] == "AnonHugePages:":
            total += int(fields[1])
    return total

def can_be_huge_code():
    libc, size = ctypes.CDLL(None), ctypes.c_size_t(mappings.HUGE_PAGE)
    memory = mmap.mmap(-1, 2 * mappings.HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = ctypes.c_size_t(up(ctypes.addressof(ctypes.c_char.from_buffer(memory))))
    libc.madvise(first, size, mappings.MADV_HUGEPAGE)
    ctypes.memset(first.value, 1, mappings.HUGE_PAGE)
    return libc.madvise(first, size, mappings.MADV_COLLAPSE) == 0 and libc.mprotect(first, size, 5) == 0

mappings.merge()
whole = sum(max((end & -mappings.HUGE_PAGE) - up(first), 0) for first, end, _ in executable())
size_before = pages() * mmap.PAGESIZE
mappings.enlarge_code_pages()
size_after = pages() * mmap.PAGESIZE
assert json.loads(json.dumps([1.5, "a"])) == [1.5, "a"] and re.sub("a+", "b", "caat") == "cbt"
assert str(decimal.Decimal(1) / 7).startswith("0.142857")
assert all(rights[0] == "r-xp" for first, end, rights in executable() if end - first > mappings.HUGE_PAGE)
child = os.fork()
if not child:
    os._exit(sum(range(10)))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 45
print(huge_kib() << 10, size_after - size_before)
print(whole if can_be_huge_code() else 0)
"""


def output_of(code: str) -> str:
    environment = {"PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[2])}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def test_the_code_moves_to_huge_pages_where_there_are_any_and_goes_on_working() -> None:
    huge, grown, wanted = map(int, output_of(ON_HUGE_PAGES).split())
    if not wanted:
        pytest.skip("no huge pages here that may become code, or no code of a whole one")
    assert huge == wanted
    assert grown < 1 << 20, "nothing is left behind"


def test_libraries_have_about_two_mappings_each() -> None:
    before, after = map(int, output_of(CODE).split())
    assert after < 0.6 * before


def test_templates_have_merged_ones() -> None:
    with Driver(workers=1, slots=1, preload=()) as driver:
        _, template = driver.resting()
        mappings = pathlib.Path(f"/proc/{template}/maps").read_text().splitlines()
    libraries = [line.split()[-1] for line in mappings if ".so" in line]
    assert len(libraries) < 3 * len(set(libraries))
