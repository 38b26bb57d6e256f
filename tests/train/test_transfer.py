"""Arrays on their way to other devices: every number arrives once, and neither side holds much more than its own."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.train import transfer
from tests import several

spans = st.tuples(st.integers(0, 9), st.integers(1, 9)).map(lambda span: (span[0], span[0] + span[1]))
boxes = st.lists(spans, max_size=3).map(tuple)


@given(boxes, st.integers(1, 50))
def test_a_box_is_cut_into_slabs_that_cover_it_once(box: transfer.Box, size: int) -> None:
    covered = np.zeros([18] * len(box), int)
    for cut in transfer._cuts(box, size):
        covered[tuple(slice(*span) for span in cut)] += 1
        assert np.prod(transfer._lengths(cut)) <= size
    inside = np.zeros_like(covered)
    inside[tuple(slice(*span) for span in box)] = 1
    assert np.array_equal(covered, inside)


def test_what_is_gathered_is_in_few_parts() -> None:
    """A layer of 70B on 128 x 4 devices: whole along the axis that 128 split, and four parts along the other."""
    shard, counts = (80, 64, 7168), [1, 128, 4]
    steps = transfer._steps(shard, counts, 32768)
    assert steps == [1, 64, 512]
    parts = map(transfer._along, shard, counts, (3, 0, 1024), steps)
    assert [len(along) for along in parts] == [1, 1, 4]
    assert transfer._along(7168, 4, 1024, 512)[1] == ((8192, 8704), 512)


def test_numbers_that_nobody_here_holds_are_missed() -> None:
    held = types.SimpleNamespace(index=(slice(0, 2), slice(None)), data=jnp.ones((2, 2)), device=jax.devices()[0])
    everything = types.SimpleNamespace(devices_indices_map=lambda shape: {jax.devices()[0]: (slice(None), slice(None))})
    half_elsewhere = types.SimpleNamespace(
        shape=(4, 2), ndim=2, size=8, addressable_shards=[held], sharding=everything
    )  # less than its sharding says
    whole = jax.sharding.NamedSharding(jax.make_mesh((1,), ("t",)), jax.sharding.PartitionSpec())
    with pytest.raises(ValueError, match="is to get 8 numbers, of which this process holds 4"):
        transfer.carried(half_elsewhere, jnp.dtype(jnp.float32), whole)


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    script = pathlib.Path(__file__).with_name("transfer_process.py")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_every_layout_becomes_every_other(reports: list[dict]) -> None:
    assert len(reports) == 12
    assert all(report["equal"] and report["placed"] for report in reports), reports


def test_neither_side_holds_more_than_its_own_and_a_chunk(reports: list[dict]) -> None:
    """The array is six chunks long. What has to be gathered is there twice: on every device that sends, and cut."""
    for report in reports:
        assert 0 < report["sending"] <= 1 + report["gathers"], report
        assert 0 < report["receiving"] <= 1, report
        assert report["left"] == 0, report
        assert report["copies"] == {"pieces to whole": 3}.get(report["layout"], 1), report


@pytest.mark.slow
def test_every_process_carries_to_its_own_devices_and_gathers_what_it_lacks(tmp_path: pathlib.Path) -> None:
    """Twelve devices, of which every process gives a third; the array is six chunks long."""
    script = pathlib.Path(__file__).with_name("carrying.py")
    for process, (code, _, err) in enumerate(several.together(script, 2, 6, str(tmp_path))):
        assert code == 0, err
        found = json.loads((tmp_path / f"{process}.json").read_text(encoding="utf-8"))
        assert len(found) == 5
        for report in found:
            assert report["equal"] and report["placed"] and report["left"] == 0, report
            # A chunk of blocks, and one of what is gathered: a piece of half of it, and the next.
            assert 0 <= report["sending"] <= 2, report
            assert 0 <= report["gathered"] <= 0.5, report
            assert (report["gathered"] == 0) == (report["layout"] == "whole in each process"), report
