"""KV pages in 8 bits: promise 2 holds as it does for floats, and how far promise 1 is missed is bounded."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrl import mesh as meshes
from jaxrl.config import MeshConfig
from jaxrl.model.kv_pages import token_bytes
from jaxrl.rollout import programs
from tests.rollout.conftest import CONFIG, MODEL, make_engine, play_all
from tests.rollout.test_engine import scored

NAMES = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0)]


@pytest.mark.parametrize(
    ("kv_dtype", "group_decode", "mean", "largest"),
    [("int8", "on", 0.03, 0.25), ("float8_e4m3fn", "off", 0.12, 0.6)],
)
def test_company_changes_no_bit_and_logprobs_stay_near_the_trainers(
    params, kv_dtype: str, group_decode: str, mean: float, largest: float
) -> None:
    """The bounds are for logits as far apart as those of this model, whose weights are ten times the usual ones."""
    engine = make_engine(params, kv_dtype=kv_dtype, group_decode=group_decode, group_width=2)
    before = play_all(engine, NAMES)
    for names in (NAMES[::-1], NAMES[1:2], NAMES[2:5]):
        for name, played in play_all(engine, names).items():
            np.testing.assert_array_equal(played.ids, before[name].ids)
            np.testing.assert_array_equal(played.logprobs, before[name].logprobs)
    gaps = [np.abs(scored(params, one, 1.0)[0] - one.logprobs)[one.mask == 1] for one in before.values()]
    assert 1e-4 < np.concatenate(gaps).mean() < mean and np.concatenate(gaps).max() < largest


def test_the_pages_take_what_is_said_of_a_token() -> None:
    mesh = meshes.replica_meshes(meshes.make_rollout_mesh(meshes.make_mesh(MeshConfig(), jax.devices()[:1])))[0]
    held, taken = {}, {}
    for kv_dtype in ("auto", "int8", "float8_e4m3fn"):
        engine = dataclasses.replace(CONFIG, kv_dtype=kv_dtype, pages=50)
        pages = jax.tree.leaves(programs.abstract_pages(engine, MODEL, mesh))
        taken[kv_dtype] = sum(leaf.size * leaf.dtype.itemsize for leaf in pages)
        held[kv_dtype] = token_bytes(MODEL, kv_dtype) * engine.pages * engine.page_size
    assert taken == held
    numbers = 2 * MODEL.layers * MODEL.kv_heads
    assert [token_bytes(MODEL, one) for one in held] == [numbers * 16 * 4, numbers * 20, numbers * 20]
