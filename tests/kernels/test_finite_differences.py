"""Gradients of interval attention against finite differences of attention in float64, written with numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_kernels import Plan, make_plan
from jaxrl_kernels.interval_attention import interval_attention_with_lse
from jaxrl_kernels.interval_attention.cases import Case

SIZE = {"batch": 1, "tokens": 6, "query_heads": 2, "kv_heads": 1, "head_width": 3}
CASES = (
    Case("tree", "tree", **SIZE),
    Case("soft_cap", "tree", scale=1.5, soft_cap=2.0, **SIZE),
    Case("window", "segments", window=2, **SIZE),
    Case("split_padding", "padded", first=2, **SIZE),
)
STEP = 1e-6

Arrays = list[np.ndarray]


def weighed(case: Case, arrays: Arrays, of_output: np.ndarray, of_log: np.ndarray) -> float:
    """A sum of all of the output and the log-sum-exps, with these weights."""
    q, k, v = arrays
    query, key = case.first + np.arange(q.shape[1])[:, None], np.arange(k.shape[1])[None, :]
    visible = (key <= query) & (query < case.ends()[0][None, :])
    visible &= (case.window == 0) | (query - key < case.window)
    seen = visible.any(axis=1)
    scores = np.einsum("bqnh,bsh->bnqs", q, k[:, :, 0]) * (case.scale or q.shape[3] ** -0.5)
    if case.soft_cap:
        scores = case.soft_cap * np.tanh(scores / case.soft_cap)
    weights = np.where(visible, np.exp(scores), 0.0)
    total = np.where(seen, weights.sum(axis=-1), 1.0)
    output = np.einsum("bnqs,bsh->bqnh", weights / total[..., None], v[:, :, 0])
    return float((output * of_output).sum() + (np.log(total).swapaxes(1, 2) * of_log).sum())


def differences(case: Case, arrays: Arrays, *weights: np.ndarray) -> Arrays:
    """The gradient of ``weighed``, one entry after another, from both sides."""
    gradients = [np.zeros_like(array) for array in arrays]
    for array, gradient in zip(arrays, gradients, strict=True):
        for place in np.ndindex(array.shape):
            middle = array[place]
            sides = []
            for array[place] in (middle + STEP, middle - STEP):
                sides.append(weighed(case, arrays, *weights))
            array[place], gradient[place] = middle, (sides[0] - sides[1]) / (2 * STEP)
    return gradients


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    generator = np.random.default_rng(5)
    queries, end = case.tokens - case.first, jnp.asarray(case.ends())
    q = generator.normal(size=(1, queries, case.query_heads, case.head_width))
    k, v = (generator.normal(size=(1, case.tokens, 1, case.head_width)) for _ in range(2))
    of_output, of_log = generator.normal(size=q.shape), generator.normal(size=q.shape[:3])
    wanted = differences(case, [q, k, v], of_output, of_log)
    for backend in ("reference", "xla"):
        heads = {"groups": 2, "head_width": case.head_width, "dtype": "float32"}
        plan = make_plan(end, **heads, queries=queries, first=case.first, implementation=backend)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan = plan) -> jax.Array:
            options = {"window": case.window, "scale": case.scale, "soft_cap": case.soft_cap, "first": case.first}
            output, log_total = interval_attention_with_lse(q, k, v, end, **options, plan=plan)
            log_total = jnp.where(jnp.isfinite(log_total), log_total, 0.0)
            return (output * of_output).sum() + (log_total * of_log).sum()

        got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
        for name, ours, exact in zip("qkv", got, wanted, strict=True):
            np.testing.assert_allclose(ours, exact, atol=5e-6, rtol=1e-5, err_msg=f"{backend}: {name}")
