"""The logged gap between sampler and trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import config as configuration
from jaxrl.rl import mismatch
from jaxrl.rl.correction import of_narrow_pages


def test_same_numbers_have_no_gap_and_ratio_one() -> None:
    logprobs = jnp.array([[-1.0, -2.0, 0.0]])
    pairs = mismatch.gap(logprobs, logprobs, jnp.array([[1.0, 1.0, 0.0]]))
    got = {name: (float(total), float(count)) for name, (total, count) in pairs.items()}
    assert got == {"logprob_gap": (0, 2), "logprob_gap_max": (0, 1), "sampler_kl": (0, 2), "ratio": (2, 2)}


def test_micro_batches_add_up_and_masked_rubbish_does_not_count() -> None:
    rng = np.random.default_rng(0)
    behaviour, mask = rng.normal(size=(4, 5)), np.array([[0, 1, 1, 0, 1]] * 3 + [[0] * 5])
    trainer = behaviour + rng.normal(size=(4, 5)) / 10
    difference = (trainer - behaviour)[mask > 0]
    spoilt = [np.where(mask > 0, array, np.nan) for array in (trainer, behaviour)]
    parts = [
        mismatch.gap(spoilt[0][rows], spoilt[1][rows], mask[rows]) for rows in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    total = jax.tree.map(lambda *values: float(sum(values)), *parts)
    mean = {name: value / count for name, (value, count) in total.items()}
    assert mean["logprob_gap"] == pytest.approx(np.abs(difference).mean(), rel=1e-5)
    assert mean["sampler_kl"] == pytest.approx((np.exp(difference) - 1 - difference).mean(), rel=1e-4)
    assert mean["ratio"] == pytest.approx(np.exp(difference).mean(), rel=1e-5)
    largest = np.abs(difference)[:3].max(), np.abs(difference)[3:].max()
    assert total["logprob_gap_max"] == (pytest.approx(sum(largest), rel=1e-5), 2)  # the empty part is not counted
    assert total["ratio"][1] == 9


def test_a_small_gap_is_measured_by_more_than_rounding() -> None:
    gap = mismatch.gap(jnp.array([[1e-3]]), jnp.zeros((1, 1)), jnp.ones((1, 1)))
    assert float(gap["sampler_kl"][0]) == pytest.approx(0.5e-6 + 1e-9 / 6, rel=1e-3)


def test_no_gradient_flows_and_huge_gaps_stay_finite() -> None:
    one = jnp.ones((1, 1))
    assert jax.grad(lambda x: mismatch.gap(x * one, 0 * one, one)["sampler_kl"][0])(2.0) == 0
    assert np.isfinite([float(value) for value, _ in mismatch.gap(500 * one, 0 * one, one).values()]).all()


def test_a_run_is_told_of_narrow_pages_and_of_what_corrects_for_them() -> None:
    settings = ["EngineConfig.kv_dtype=int8"]
    assert of_narrow_pages(configuration.load("", [])) == ""
    told = of_narrow_pages(configuration.load("", settings))
    assert (
        "EngineConfig.kv_dtype='int8'" in told and "AlgorithmConfig.mismatch='tis' with proximal='recomputed'" in told
    )
    corrected = [*settings, "AlgorithmConfig.rejection=band"]
    assert of_narrow_pages(configuration.load("", corrected)).endswith(
        "AlgorithmConfig.rejection='band' judges that gap"
    )
