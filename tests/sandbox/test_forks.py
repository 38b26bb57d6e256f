"""Cheap forks: hooks put aside, memory on huge pages."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

from jaxrl.sandbox import forks
from tests.sandbox.driver import Driver


def test_hooks_are_put_aside_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[dict] = []
    monkeypatch.setattr(forks, "_register", lambda **hooks: registered.append(hooks))
    monkeypatch.setattr(forks, "_hooks", [])
    monkeypatch.setattr(os, "register_at_fork", os.register_at_fork)
    forks.defer_hooks()
    os.register_at_fork(before=print)
    assert registered == []
    forks.register_hooks()
    assert registered == [{"before": print}]
    forks.restore_registration()
    os.register_at_fork(after_in_child=print)
    assert registered[1:] == [{"after_in_child": print}]


def test_heap_goes_to_huge_pages() -> None:
    """Hole 6: huge pages that are asked for and silently not given."""
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    switch = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if release < (6, 1) or not switch.exists() or "[never]" in switch.read_text():
        pytest.skip("this kernel does not give huge pages on request")
    code = (
        "import gc\nfrom jaxrl.sandbox.forks import settle_heap\nheld = [[n, str(n)] for n in range(300_000)]\n"
        "settle_heap()\nassert not gc.isenabled() and gc.get_freeze_count() > 300_000\n"
        "print(open('/proc/self/smaps_rollup').read())"
    )
    environment = {"PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[2])}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    (size,) = (int(line.split()[1]) for line in shown.stdout.splitlines() if line.startswith("AnonHugePages:"))
    assert size >= 8192  # KiB, of some 30 MiB


def test_snippets_may_register_hooks(sandbox: Driver) -> None:
    assert sandbox.run("import os\nos.register_at_fork(before=print)\nprint('fine')").stdout == "fine\n"
