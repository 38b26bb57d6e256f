"""What holds for every row of the tables of policy losses and of corrections."""

import functools
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.rl.advantages import ADVANTAGES
from jaxrl.rl.correction import RANKING
from jaxrl.rl.distillation import DECOMPOSED_LOSSES, SAMPLED_LOSSES, WHOLE_LOSSES
from jaxrl.rl.mismatch import MISMATCH, REJECTIONS
from jaxrl.rl.policy_losses import POLICY_LOSSES
from jaxrl.rl.tokens import sampled

ROWS, TOKENS = 4, 10
METHODS = {**POLICY_LOSSES, **MISMATCH, **{f"reject {name}": method for name, method in REJECTIONS.items()}}
SEGMENTS = np.array([[1] * 4 + [2] * 5 + [0], [1] * 10, [1, 2, 2, 3, 3, 3, 4, 4, 0, 0], [0] * 10], np.int32)


@functools.cache
def computed(name: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Values [B, T] of a method and the gradient of their weighted sum, compiled once."""

    def total(logprobs: Any, weights: Any, mask: Any, arrays: Any, segment_ids: Any) -> tuple[jax.Array, jax.Array]:
        proximal, behaviour, advantages, entropy = arrays
        tokens = sampled(
            mask,
            logprobs,
            proximal_logprobs=proximal,
            behaviour_logprobs=behaviour,
            advantages=advantages,
            segment_ids=segment_ids,
            entropy=entropy,
        )
        result = METHODS[name](tokens)
        values = result.loss if name in POLICY_LOSSES else result
        return (weights * values).sum(), values

    gradient = jax.jit(jax.grad(total, has_aux=True))

    def compute(draw: "Draw", rows: Any = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Of some of the rows, the others being padding."""
        here = np.zeros((ROWS, 1), np.float32)
        here[rows] = 1
        slope, values = gradient(
            draw.logprobs, draw.mask * here, draw.mask * here, draw.rest, SEGMENTS[draw.order] * here.astype(np.int32)
        )
        return np.asarray(values) * draw.mask * here, np.asarray(slope)

    return compute


class Draw:
    """Random log-probabilities, advantages and masks; a trajectory has one advantage."""

    def __init__(self, seed: int, spread: float = 0.3, sampled_share: float = 0.6) -> None:
        draw = np.random.default_rng(seed)
        shape = (ROWS, TOKENS)
        self.order = np.arange(ROWS)
        self.mask = ((draw.random(shape) < sampled_share) & (SEGMENTS > 0)).astype(np.float32)
        self.logprobs = -np.abs(draw.normal(size=shape)).astype(np.float32) - 0.05
        older = [np.minimum(self.logprobs + spread * draw.normal(size=shape), -0.01) for _ in range(2)]
        advantages = draw.normal(size=(ROWS, 6))[np.arange(ROWS)[:, None], SEGMENTS]
        self.rest = np.stack([*older, advantages, draw.random(shape)]).astype(np.float32)

    def permuted(self, order: np.ndarray) -> "Draw":
        other = Draw(0)
        other.order, other.mask, other.logprobs = order, self.mask[order], self.logprobs[order]
        other.rest = self.rest[:, order]
        return other


def near(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=8)
@given(st.integers(0, 10_000), st.sampled_from([0.0, np.nan, np.inf, -np.inf, 1e30]))
def test_what_was_not_sampled_has_no_gradient_and_changes_nothing(name: str, seed: int, rubbish: float) -> None:
    draw = Draw(seed)
    values, slope = computed(name)(draw)
    assert (slope[draw.mask == 0] == 0).all()
    draw.logprobs = np.where(draw.mask > 0, draw.logprobs, np.float32(rubbish))
    draw.rest = np.where(draw.mask > 0, draw.rest, np.float32(rubbish))
    spoilt_values, spoilt_slope = computed(name)(draw)
    np.testing.assert_array_equal(spoilt_values, values)
    np.testing.assert_array_equal(spoilt_slope, slope)


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=8)
@given(st.integers(0, 10_000), st.permutations(range(ROWS)))
def test_permuting_rows_permutes_the_results(name: str, seed: int, order: list[int]) -> None:
    draw = Draw(seed)
    for got, expected in zip(computed(name)(draw.permuted(np.array(order))), computed(name)(draw), strict=True):
        near(got, expected[order])


@pytest.mark.parametrize("name", [name for name in METHODS if name.removeprefix("reject ") not in RANKING])
@settings(deadline=None, max_examples=8)
@given(st.integers(0, 10_000), st.integers(0, ROWS))
def test_cutting_a_batch_changes_nothing(name: str, seed: int, cut: int) -> None:
    draw, compute = Draw(seed), computed(name)
    parts = [compute(draw, slice(0, cut)), compute(draw, slice(cut, ROWS))]
    for got, other, expected in zip(*parts, compute(draw), strict=True):
        near(got + other, expected)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_infinite_or_nan(name: str) -> None:
    """For rows without a token, with one, and for policies that could not be further apart."""
    extremes = [Draw(1, sampled_share=0.0), Draw(2, sampled_share=0.05), Draw(3, sampled_share=1.0)]
    for sign in (-1, 1):
        far = Draw(4, sampled_share=1.0)
        far.logprobs = np.full_like(far.logprobs, -60.0 if sign < 0 else -1e-6)
        far.rest[:2] = -1e-6 if sign < 0 else -60.0
        extremes.append(far)
    for draw in extremes:
        for result in computed(name)(draw):
            assert np.isfinite(result).all()
    values, slope = computed(name)(extremes[0])
    assert not values.any() and not slope.any()


def test_every_method_stands_in_the_page_with_its_settings() -> None:
    page = (pathlib.Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    distillation = SAMPLED_LOSSES | DECOMPOSED_LOSSES | WHOLE_LOSSES
    for table in (POLICY_LOSSES, MISMATCH, REJECTIONS, ADVANTAGES, distillation):
        for name, method in table.items():
            settings = list(inspect.signature(method).parameters)[1:]
            assert any(
                f"`{name}`" in row.split("|")[1] and all(f"`{setting}`" in row for setting in settings) for row in rows
            ), name


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_on_policy_every_loss_is_the_policy_gradient(name: str) -> None:
    """Where all policies agree the gradient is -A; losses of a sequence spread the same over its tokens."""
    draw = Draw(5, spread=0.0)
    _, slope = computed(name)(draw)
    expected = -draw.rest[2] * draw.mask
    if name in ("flowrl", "a_star_po"):  # their targets are no advantages; tests/rl/test_targets.py has their gradients
        return
    if name in ("luspo", "sppo", "gvpo"):  # a sequence of m tokens counts m times; a square has twice the slope
        same = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
        slope_of = {"luspo": 1.0, "sppo": 2.0, "gvpo": 0.1}[name]
        expected = expected * (same * draw.mask[:, None]).sum(axis=2) * slope_of
    if name == "clip_cov":  # one token is spared
        assert (np.abs(slope - expected) > 1e-5).sum() <= 1
        return
    near(slope, expected)


def test_losses_of_all_names_move_the_policy_as_the_advantage_says() -> None:
    """A single token, on policy: up where A > 0, down where A < 0."""
    one = jnp.ones((1, 1))
    fixed = {
        "proximal_logprobs": -one,
        "behaviour_logprobs": -one,
        "segment_ids": one.astype(jnp.int32),
        "entropy": one,
    }

    def losses(x: jax.Array, advantage: jax.Array) -> jax.Array:
        tokens = sampled(one, x * one, advantages=advantage * one, **fixed)
        return jnp.stack([loss(tokens).loss.sum() for loss in POLICY_LOSSES.values()])

    slopes = jax.jit(jax.jacobian(losses))
    for advantage in (2.0, -2.0):
        np.testing.assert_array_equal(np.sign(slopes(-1.0, advantage)), -np.sign(advantage))
