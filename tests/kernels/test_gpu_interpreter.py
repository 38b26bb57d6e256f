"""The kernels for GPUs in the interpreter that has a GPU's threads and barriers: races, and waits that are missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from jaxrl_kernels import Plan, interval_attention
from jaxrl_kernels.interval_attention import mosaic_gpu
from jaxrl_kernels.interval_attention.pairs import Blocks
from jaxrl_kernels.interval_attention.tables import Tables, make_tables


@pytest.fixture(autouse=True)
def races_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_gpu, "interpreter", lambda: InterpretGPUParams(detect_races=True))


def differentiated(tokens: int, plan: str) -> tuple[jax.Array, ...]:
    """Output and gradients of a causal row of one head, in blocks of eight."""
    q, k, v, end, lists = causal_row(tokens)
    chosen = Plan(lists if plan == "mosaic_gpu_interpreted" else (), plan)
    output, pull = jax.vjp(lambda q, k, v: interval_attention(q, k, v, end, plan=chosen), q, k, v)
    return jax.block_until_ready((output, *pull(jnp.cos(q))))


def attended(tokens: int) -> jax.Array:
    q, k, v, end, lists = causal_row(tokens)
    return jax.block_until_ready(interval_attention(q, k, v, end, plan=Plan(lists, "mosaic_gpu_interpreted")))


def causal_row(tokens: int) -> tuple[jax.Array | Tables, ...]:
    generator = np.random.default_rng(2)
    q, k, v = (jnp.asarray(generator.normal(size=(1, tokens, 1, 8)), jnp.float32) for _ in range(3))
    end = jnp.full((1, tokens), tokens, jnp.int32)
    return q, k, v, end, make_tables(end, queries=tokens, first=0, blocks=Blocks(8, 8))


@pytest.mark.slow
def test_no_race_where_the_tiles_of_partners_are_used_again() -> None:
    got = differentiated(32, "mosaic_gpu_interpreted")
    assert not gpu_callbacks.get_races().races_found
    for ours, wanted in zip(got, differentiated(32, "reference"), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_tiles_that_are_not_waited_for_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_gpu.plgpu, "barrier_wait", lambda barrier: None)
    attended(8)
    assert gpu_callbacks.get_races().races_found


def test_tiles_that_are_copied_over_too_early_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_gpu.plgpu, "barrier_wait", lambda barrier: None)
    with pytest.raises(Exception, match="before previous completion was observed|no threads observed phase"):
        attended(32)
    gpu_callbacks.reset_gpu_interpret_mode_state()
