"""The trainer's weights on their way to the engines. What needs several devices is in tests/test_mesh.py."""

import asyncio

import jax
import pytest

from jaxrl.config import MeshConfig
from jaxrl.mesh import make_mesh, make_rollout_mesh
from jaxrl.model import spec, transformer
from jaxrl.rollout.fleet import Fleet
from jaxrl.train import sync
from jaxrl.train.sync import hand_over, rollout_params
from tests.rollout.conftest import CONFIG, MODEL, STOPS, play_all, prompt_of


@pytest.fixture(scope="module")
def params():
    return spec.initialize(transformer.param_specs(MODEL), jax.random.key(0))


@pytest.fixture
def fleet(params) -> Fleet:
    mesh = make_rollout_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))
    return Fleet(CONFIG, MODEL, rollout_params(params, MODEL, mesh), mesh, stop_ids=STOPS, seed=11)


def test_an_idle_engine_frees_its_weights_before_the_new_ones_are_made(params, fleet):
    (engine,) = fleet._engines
    old = jax.tree.leaves(engine._params)
    asyncio.run(hand_over(params, MODEL, fleet, 4))
    assert all(leaf.is_deleted() for leaf in old) and fleet.stats()["version"] == 4
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params)), "the trainer keeps its own"
    assert play_all(fleet, [(0, 0)])[0, 0].samples[0].versions[0] == 4


def test_a_sequence_in_the_middle_goes_on_with_the_new_weights_and_never_are_there_two_copies(params, monkeypatch):
    """Weights arrive twice while it samples. Nothing waits for its end; every token has the version it came from."""
    mesh = make_rollout_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))
    fleet = Fleet(CONFIG, MODEL, rollout_params(params, MODEL, mesh), mesh, stop_ids=(), seed=11)
    (engine,) = fleet._engines
    old = []

    def made(*arguments):
        assert old and all(leaf.is_deleted() for leaf in old)
        return rollout_params(*arguments)

    monkeypatch.setattr(sync, "rollout_params", made)

    async def run() -> None:
        async with fleet.serving():
            sequence = await fleet.open(prompt_of(1), draw=1, sample=0, max_tokens=56)
            generating = asyncio.create_task(sequence.generate(56))
            for version in (1, 2):
                rounds = engine.counters.rounds
                while engine.counters.rounds == rounds:
                    await asyncio.sleep(0)
                old[:] = jax.tree.leaves(engine._params)
                await hand_over(params, MODEL, fleet, version)
                assert not generating.done()
            sample = await generating
            versions = sample.versions.tolist()
            assert versions == sorted(versions) and set(versions) == {0, 1, 2}
            sequence.close()
            assert engine.load == 0

    asyncio.run(run())


def test_weights_are_not_released_under_a_round(params, fleet):
    async def run() -> None:
        async with fleet.serving():
            with pytest.raises(ValueError, match="released inside `async with engine.between_rounds"):
                fleet.release_weights()

    asyncio.run(run())


def test_weights_that_are_not_the_models_are_refused_and_the_old_ones_stay(params, fleet):
    with pytest.raises(ValueError, match="the trees differ"):
        asyncio.run(hand_over({"embedding": params["embedding"]}, MODEL, fleet, 1))
    with pytest.raises(ValueError, match=r"weight \['final_norm'\] has shape \(1,\); the model wants \(64,\)"):
        asyncio.run(hand_over(params | {"final_norm": params["final_norm"][:1]}, MODEL, fleet, 1))
    with pytest.raises(ValueError):
        fleet.set_weights((), 1)
    assert fleet.stats()["version"] == 0 and len(play_all(fleet, [(0, 0)])) == 1
