"""Merged mappings, and code on huge pages: less for a fork to copy, and libraries that still work."""

import pathlib
import subprocess
import sys

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

def up(address):
    return address + -address % mappings.HUGE_PAGE

def can_collapse():
    libc, size = ctypes.CDLL(None), 2 * mappings.HUGE_PAGE
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    first = up(first)
    libc.madvise(ctypes.c_size_t(first), ctypes.c_size_t(mappings.HUGE_PAGE), mappings.MADV_HUGEPAGE)
    ctypes.memset(first, 1, mappings.HUGE_PAGE)
    return libc.madvise(ctypes.c_size_t(first), ctypes.c_size_t(mappings.HUGE_PAGE), mappings.MADV_COLLAPSE) == 0

mappings.merge()
whole = any(up(first) + mappings.HUGE_PAGE <= end for first, end, _ in executable())
mappings.enlarge_code_pages()
assert json.loads(json.dumps([1.5, "a"])) == [1.5, "a"] and re.sub("a+", "b", "caat") == "cbt"
assert str(decimal.Decimal(1) / 7).startswith("0.142857")
assert all(rights[0] == "r-xp" for first, end, rights in executable() if end - first > mappings.HUGE_PAGE)
child = os.fork()
if not child:
    os._exit(sum(range(10)))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 45
print(whole and can_collapse())
print(any(len(rest) == 4 and end - first >= mappings.HUGE_PAGE for first, end, rest in executable()))
"""


def output_of(code: str) -> str:
    environment = {"PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[2])}
    return subprocess.run([sys.executable, "-c", code], env=environment, stdout=-1, text=True, check=True).stdout


def test_the_code_moves_to_huge_pages_where_there_are_any_and_goes_on_working() -> None:
    there_are, moved = output_of(ON_HUGE_PAGES).split()
    assert moved == there_are


def test_libraries_have_about_two_mappings_each() -> None:
    before, after = map(int, output_of(CODE).split())
    assert after < 0.6 * before


def test_templates_have_merged_ones() -> None:
    with Driver(workers=1, slots=1, preload=()) as driver:
        _, template = driver.resting()
        mappings = pathlib.Path(f"/proc/{template}/maps").read_text().splitlines()
    libraries = [line.split()[-1] for line in mappings if ".so" in line]
    assert len(libraries) < 3 * len(set(libraries))
