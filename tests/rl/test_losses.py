"""Worked numbers of the losses, and the promises about masks and micro-batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.rl import divergence
from jaxrl.rl.aggregation import aggregation_weights
from jaxrl.rl.policy_losses.clipped import ppo_clip
from jaxrl.rl.tokens import TokenLoss
from tests.rl.rows import tokens_of, weights_of


def clipped_loss(logprobs: Any, old: Any, advantages: Any, mask: Any, **options: float) -> TokenLoss:
    return ppo_clip(tokens_of(mask, logprobs, advantages, proximal=old), **{"dual_clip": 0.0, **options})


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (5.0, -1.0, 3.0, 0.0),  # dual clip
        (0.5, -1.0, 0.8, 0.0),  # clip from below
        (1.5, 1.0, -1.28, 0.0),  # clip from above
        (1.0, 2.0, -2.0, -2.0),
        (1.5, -1.0, 1.5, 1.5),  # a bad token grown likelier is pushed back in full
        (0.5, 1.0, -0.5, -0.5),  # a good token grown unlikelier is pulled back in full
    ],
)
def test_worked_tokens(ratio: float, advantage: float, expected: float, slope: float) -> None:
    def loss(logprob: jax.Array) -> jax.Array:
        one = jnp.ones((1, 1))
        return clipped_loss(
            logprob * one, 0 * one, advantage * one, one, clip_low=0.2, clip_high=0.28, dual_clip=3.0
        ).loss.sum()

    value, gradient = jax.value_and_grad(loss)(jnp.log(ratio))
    np.testing.assert_allclose((value, gradient), (expected, slope), rtol=1e-6)


def test_log_ratio_is_bounded_and_its_gradient_ends_there() -> None:
    one = jnp.ones((1, 1))
    value, gradient = jax.value_and_grad(
        lambda x: clipped_loss(x * one, 0 * one, -one, one, clip_low=0.2, clip_high=0.2).loss.sum()
    )(90.0)
    assert value == pytest.approx(np.exp(20.0), rel=1e-5)
    assert gradient == 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k1+", "k3+"])
def test_kl_gradients_point_where_the_docstring_says(estimator: Any) -> None:
    """Expected over all tokens of a small softmax: exact gradients, no sampling."""
    logits = jnp.array([0.3, -0.5, 0.8, 0.0])
    reference = jax.nn.log_softmax(jnp.array([-0.2, 0.4, 0.1, 0.6]))

    def expected_estimate(x: jax.Array) -> jax.Array:
        logprobs = jax.nn.log_softmax(x)
        chance = jax.lax.stop_gradient(jnp.exp(logprobs))
        return (chance * divergence.kl(logprobs, reference, jnp.ones(4), estimator)).sum()

    def forward(x: jax.Array) -> jax.Array:
        logprobs = jax.nn.log_softmax(x)
        return (jnp.exp(logprobs) * (logprobs - reference)).sum()

    def backward(x: jax.Array) -> jax.Array:
        return (jnp.exp(reference) * (reference - jax.nn.log_softmax(x))).sum()

    value, gradient = jax.value_and_grad(expected_estimate)(logits)
    wanted = {"k1": jnp.zeros(4), "k3": jax.grad(backward)(logits)}.get(estimator, jax.grad(forward)(logits))
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)
    if estimator != "k2":  # k2 is biased in value
        assert value == pytest.approx(float(forward(logits)), abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs", "k3+"])
def test_a_kl_is_nothing_where_nothing_was_sampled(estimator: Any) -> None:
    """Whatever stands there, beside a token where it is something."""
    own, other = jnp.array([[-1.0, jnp.nan, -3.0]]), jnp.array([[-2.0, -7.0, jnp.nan]])
    got = np.asarray(divergence.kl(own, other, jnp.array([[1.0, 0.0, 0.0]]), estimator))
    assert got[0, 0] > 0 and (got[0, 1:] == 0).all()


def test_a_small_kl_is_measured_by_more_than_rounding() -> None:
    value = divergence.kl(jnp.array([[1e-3]]), jnp.zeros((1, 1)), jnp.ones((1, 1)), "k3")
    assert float(value[0, 0]) == pytest.approx(0.5e-6 - 1e-9 / 6, rel=1e-3)


def test_an_adapted_coefficient_is_never_negative() -> None:
    assert divergence.adapted(0.1, 0.0, target=1.0, horizon=10, count=100) == 0
    assert divergence.adapted(0.1, 0.0, target=1.0, horizon=10, count=5) == pytest.approx(0.09)


@pytest.mark.parametrize("rubbish", [0.0, np.nan, np.inf, -np.inf, 1e30])
def test_promise_3_a_masked_token_has_exactly_zero_gradient_whatever_stands_in_it(rubbish: float) -> None:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (3, 7)).astype(np.float32)
    logprobs, old, reference, advantages = (rng.normal(size=(3, 7)).astype(np.float32) for _ in range(4))
    weights = weights_of(mask, "sequence")

    def loss(x: jax.Array, old: Any, reference: Any, advantages: Any) -> jax.Array:
        surrogate = clipped_loss(x, old, advantages, mask, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
        divergences = sum(divergence.kl(x, reference, mask, estimator) for estimator in ("k1", "k2", "k3"))
        return (weights * (surrogate.loss + divergences)).sum()

    clean = jax.value_and_grad(loss)(logprobs, old, reference, advantages)
    spoilt = [np.where(mask > 0, array, np.float32(rubbish)) for array in (logprobs, old, reference, advantages)]
    value, gradient = jax.value_and_grad(loss)(*spoilt)
    assert value == clean[0]
    np.testing.assert_array_equal(gradient, clean[1])
    assert (np.asarray(gradient)[mask == 0] == 0).all()
    assert (np.asarray(gradient)[mask > 0] != 0).any()


def bigram_loss(
    table: jax.Array, tokens: np.ndarray, mask: np.ndarray, weights: np.ndarray, advantages: np.ndarray
) -> jax.Array:
    """Policy gradient of a softmax over the next token given the previous one; ``table`` is [V, V], the rest [B, T]."""
    logprobs = jax.nn.log_softmax(table)[tokens[:, :-1], tokens[:, 1:]]
    old = jnp.sin(tokens[:, 1:] * 3.0 + tokens[:, :-1]) / 5 - 1.4
    result = clipped_loss(logprobs, old, advantages[:, 1:], mask[:, 1:], clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    return (weights[:, 1:] * result.loss).sum()


bigram_gradient = jax.jit(jax.value_and_grad(bigram_loss))


def test_promise_3_only_what_follows_a_sampled_token_moves_the_softmax() -> None:
    table = jnp.asarray(np.random.default_rng(1).normal(size=(5, 5)), jnp.float32)
    tokens, mask = np.array([[0, 1, 2, 3, 4, 1]]), np.array([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]])
    gradient = np.asarray(jax.grad(bigram_loss)(table, tokens, mask, mask / 2, np.full((1, 6), -1.0)))
    # Sampled are the tokens after 0 and after 2: no other row of the table may move, not by a rounding error.
    np.testing.assert_array_equal(np.abs(gradient).max(axis=1) > 0, [True, False, True, False, False])


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 2)), min_size=6, max_size=6),
    st.sampled_from(["token", "token_sum", "sequence", "sequence_sum", "constant"]),
)
def test_promise_3_the_loss_does_not_depend_on_the_cut_into_micro_batches(
    trajectories: list[tuple[list[bool], int]], mode: Any
) -> None:
    masks, cut = (np.array(column) for column in zip(*trajectories, strict=True))
    masks[:, 0] = False
    rng = np.random.default_rng(0)
    table = rng.normal(size=(4, 4)).astype(np.float32)
    tokens, advantages = rng.integers(0, 4, (6, 6)), rng.normal(size=(6, 6)).astype(np.float32)
    weights = weights_of(masks, mode, 6)

    def micro_batch(members: np.ndarray) -> tuple[jax.Array, jax.Array]:
        rows = members[:, None]  # rows of other micro-batches are padding here
        return bigram_gradient(table, tokens * rows, masks * rows * 1.0, weights * rows, advantages)

    whole = micro_batch(np.ones(6, bool))
    parts = [micro_batch(cut == part) for part in range(3)]
    np.testing.assert_allclose(sum(part[0] for part in parts), whole[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sum(part[1] for part in parts), whole[1], rtol=1e-5, atol=1e-6)


@given(st.lists(st.lists(st.booleans(), max_size=8), min_size=1, max_size=8))
def test_weights_sum_to_what_their_mode_says(masks: list[list[bool]]) -> None:
    arrays = [np.array(mask, bool) for mask in masks]
    some = [mask for mask in arrays if mask.any()]
    count, tokens = max(len(some), 1), sum(int(mask.sum()) for mask in some)
    totals = {"token": float(bool(some)), "token_sum": tokens, "sequence": float(bool(some))}
    totals |= {"sequence_sum": tokens / count, "constant": tokens / (8 * count)}
    for mode, expected in totals.items():
        weights = aggregation_weights(arrays, mode, 8)
        for mask, weight in zip(arrays, weights, strict=True):
            assert weight.dtype == np.float32
            assert ((weight > 0) == mask).all()
            if mode == "sequence" and mask.any():
                assert weight.sum() == pytest.approx(1 / count, rel=1e-5)
        assert sum(float(weight.sum()) for weight in weights) == pytest.approx(expected, rel=1e-5)


def test_constant_aggregation_needs_a_length() -> None:
    with pytest.raises(ValueError, match="constant_length=0 must be at least 1"):
        aggregation_weights([np.ones(3)], "constant")
