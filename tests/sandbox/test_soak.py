"""Thousands of calls of every kind leave nothing behind; the benchmark of the same name runs a hundred thousand."""

import asyncio

import pytest

from benchmarks import soak


@pytest.mark.slow
def test_nothing_grows() -> None:
    lines = asyncio.run(soak.measure(5000))
    broken = [line for line in lines if line["holds"] is False]
    assert not broken
    statuses = next(line["value"] for line in lines if line["what"] == "calls")
    kinds = ("ok", "error", "timeout", "out_of_memory", "output_limit")
    assert all(statuses[kind] >= 15 for kind in kinds), statuses
