"""Landlock's rules as calls that a child makes."""

import os

import pytest

from jaxrl.sandbox import landlock

FIRST = 700  # no descriptor of ours lies there


@pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
def test_preparing_opens_two_descriptors_and_no_other() -> None:
    rules = landlock.Rules(("/tmp",))
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        rules.prepare(FIRST)
    assert set(os.listdir("/proc/self/fd")) - before == {str(FIRST), str(FIRST + 1)}
    os.closerange(FIRST, FIRST + 2)
