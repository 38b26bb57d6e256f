"""Merged mappings: fewer of them, and libraries that still work."""

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


def test_libraries_have_about_two_mappings_each() -> None:
    environment = {"PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[2])}
    shown = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    before, after = map(int, shown.stdout.split())
    assert after < 0.6 * before


def test_templates_have_merged_ones() -> None:
    with Driver(workers=1, slots=1, preload=()) as driver:
        _, template = driver.resting()
        mappings = pathlib.Path(f"/proc/{template}/maps").read_text().splitlines()
    libraries = [line.split()[-1] for line in mappings if ".so" in line]
    assert len(libraries) < 3 * len(set(libraries))
