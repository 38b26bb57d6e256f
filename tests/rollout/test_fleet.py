"""Replicas behind the interface of one engine. What needs several devices is in tests/test_mesh.py."""

import asyncio
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxrl.config import MeshConfig
from jaxrl.mesh import make_mesh, make_rollout_mesh
from jaxrl.rollout.counters import Counters, figures, total
from jaxrl.rollout.engine import EngineFailure
from jaxrl.rollout.fleet import Fleet
from tests.rollout.conftest import CONFIG, MODEL, STOPS, make_engine, play, play_all, prompt_of

NAMES = [(draw, sample) for draw in range(2) for sample in range(3)]


@pytest.fixture
def fleet(params) -> Fleet:
    mesh = make_rollout_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))
    return Fleet(CONFIG, MODEL, (params,), mesh, stop_ids=STOPS, seed=11)


@pytest.fixture
def pair(params) -> Fleet:
    """Two replicas, which share a device: for where sequences are played it makes no difference."""
    mesh = make_rollout_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))
    mesh = Mesh(np.repeat(mesh.devices, 2, axis=0), mesh.axis_names, axis_types=mesh.axis_types)
    return Fleet(CONFIG, MODEL, (params, params), mesh, stop_ids=STOPS, seed=11)


def test_a_fleet_of_one_is_the_engine(params, fleet):
    wanted, got = play_all(make_engine(params), NAMES), play_all(fleet, NAMES)
    for name, played in wanted.items():
        np.testing.assert_array_equal(played.ids, got[name].ids)
        np.testing.assert_array_equal(played.logprobs, got[name].logprobs)
    assert fleet.stats()["opened"] == len(NAMES)


def test_an_engine_knows_whose_sequences_are_open(params):
    engine = make_engine(params, pages=46)  # not all fit at once: some are queued, some are admitted

    async def run() -> None:
        async with engine.serving():
            tasks = [asyncio.create_task(play(engine, draw, sample)) for draw, sample in NAMES]
            while not engine.stats()["rounds"]:
                await asyncio.sleep(0)
            assert engine.load == len(NAMES) and engine.plays(0) and engine.plays(1) and not engine.plays(2)
            tasks[0].cancel()
            await asyncio.wait(tasks[:1])
            assert engine.load <= len(NAMES) - 1
            await asyncio.gather(*tasks[1:])
            assert engine.load == 0 and not engine.plays(0)

    asyncio.run(run())


def test_a_group_larger_than_a_replica_has_slots_goes_on_where_slots_are_free(pair):
    async def run() -> None:
        async with pair.serving():
            for sample in range(CONFIG.slots):
                await pair.open(prompt_of(0), draw=0, sample=sample, max_tokens=4)
            assert [engine.load for engine in pair._engines] == [CONFIG.slots, 0]
            for sample in range(3):
                await pair.open(prompt_of(0), draw=0, sample=CONFIG.slots + sample, max_tokens=4)
            assert [engine.load for engine in pair._engines] == [CONFIG.slots, 3]
            for sample in range(CONFIG.slots - 3):
                await pair.open(prompt_of(1), draw=1, sample=sample, max_tokens=4)
            assert [engine.load for engine in pair._engines] == [CONFIG.slots, CONFIG.slots]
            waiting = asyncio.create_task(pair.open(prompt_of(1), draw=1, sample=CONFIG.slots, max_tokens=4))
            await asyncio.sleep(0)
            assert [engine.load for engine in pair._engines] == [CONFIG.slots, CONFIG.slots + 1], "no slot is free"
            await waiting

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_replica_that_failed_is_told_and_draws_no_sequences(pair, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    async def run() -> None:
        async with pair.serving():
            monkeypatch.setattr(pair._engines[0], "_run", fail)
            with pytest.raises(EngineFailure, match="out of memory"):
                await play(pair, 0, 0)
            monkeypatch.undo()
            pair._engines[0], pair._engines[1] = pair._engines[1], pair._engines[0]
            with pytest.raises(EngineFailure, match="failed earlier: .*out of memory"):
                await play(pair, 1, 0)  # the first replica would play it

    asyncio.run(asyncio.wait_for(run(), 60))


def test_counters_of_replicas_add_up():
    one = Counters(opened=2, decode_tokens=30, slot_steps=40, decode_seconds=1.0, serving_seconds=4.0)
    two = Counters(opened=6, decode_tokens=10, slot_steps=40, decode_seconds=3.0, serving_seconds=4.0)
    one.longest_queue_seconds, two.longest_queue_seconds, two.queue_seconds = 3.0, 2.0, 4.0
    both = figures(total([one, two]))
    assert both["opened"] == 8 and both["occupancy"] == 0.5 and both["idle_share"] == 0.5
    assert both["longest_queue_seconds"] == 3.0 and math.isclose(both["mean_queue_seconds"], 0.5)
