"""Every backend of interval attention against the reference: the case table, its mask, and memory linear in T."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_kernels.interval_attention import interval_attention, segment_ends
from jaxrl_kernels.interval_attention.cases import CASES, Case

BACKENDS = ("xla",)


def inputs(case: Case) -> tuple[jax.Array, ...]:
    generator = np.random.default_rng(3)
    heads = (case.query_heads, case.kv_heads, case.kv_heads, case.query_heads)
    lengths = (case.tokens - case.first, case.tokens, case.tokens, case.tokens - case.first)
    shapes = [(case.batch, length, count, case.head_width) for length, count in zip(lengths, heads, strict=True)]
    return tuple(jnp.asarray(generator.normal(size=shape), case.dtype) for shape in shapes)


def output_and_gradients(case: Case, implementation: str, exact: bool = False) -> tuple[jax.Array, ...]:
    """Output and the gradients for q, k and v; with ``exact``, on float32 copies of the same numbers."""
    q, k, v, cotangent = (x.astype(jnp.float32) if exact else x for x in inputs(case))
    positions = case.positions()

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        first = jnp.int32(case.first) if case.first else 0
        options = {"window": case.window, "first": first, "scale": case.scale, "soft_cap": case.soft_cap}
        if positions is not None:
            options["positions"] = jnp.asarray(positions)
        return interval_attention(q, k, v, jnp.asarray(case.ends()), implementation=implementation, **options)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        output, pull = jax.vjp(run, q, k, v)
        return (output, *pull(cotangent))

    return jax.jit(both)(q, k, v, cotangent)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, backend: str) -> None:
    wanted = output_and_gradients(case, "reference", exact=True)
    naive = output_and_gradients(case, "reference")
    got = output_and_gradients(case, backend)
    for name, exact, plain, ours in zip(["output", "q", "k", "v"], wanted, naive, got, strict=True):
        assert ours.dtype == case.dtype
        error = float(jnp.abs(ours.astype(jnp.float32) - exact).max())
        naive_error = float(jnp.abs(plain.astype(jnp.float32) - exact).max())
        allowed = 2 * naive_error + (2e-5 if case.dtype == "float32" else 2e-2)
        assert error <= allowed, f"{name} is off by {error}, allowed {allowed}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [24, 300])
def test_rows_that_see_nothing_are_exactly_zero(backend: str, tokens: int) -> None:
    case = Case("padded", "padded", tokens=tokens)
    output, q, k, v = output_and_gradients(case, backend)
    hidden = case.ends() == 0
    assert hidden.any()
    for array in (output, q, k, v):
        assert not np.asarray(array)[hidden].any()
        assert np.isfinite(np.asarray(array)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bitwise_equal(backend: str) -> None:
    case = Case("segments", "segments", tokens=200)
    for first, second in zip(output_and_gradients(case, backend), output_and_gradients(case, backend), strict=True):
        np.testing.assert_array_equal(first, second)


def test_window_may_be_traced() -> None:
    case = Case("segments", "segments")
    q, k, v, _ = inputs(case)
    end = jnp.asarray(case.ends())
    run = jax.jit(lambda window: interval_attention(q, k, v, end, window=window))
    for window in (0, 1, 3):
        wanted = interval_attention(q, k, v, end, window=window, implementation="reference")
        np.testing.assert_allclose(run(jnp.int32(window)), wanted, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", *BACKENDS])
def test_a_window_by_position_ignores_what_other_branches_put_between(implementation: str) -> None:
    """Every response of a group sees of the shared prompt what it would see in a row of its own."""
    prompt, response, window = 5, 4, 6
    tokens = prompt + 3 * response
    q, k, v, _ = inputs(Case("group", "causal", batch=1, tokens=tokens))
    end = np.full((1, tokens), tokens, np.int32)
    positions = np.arange(tokens, dtype=np.int32)[None].copy()
    for left in range(prompt, tokens, response):
        end[:, left : left + response] = left + response
        positions[:, left : left + response] = np.arange(prompt, prompt + response)
    together = interval_attention(
        q, k, v, jnp.asarray(end), window=window, positions=jnp.asarray(positions), implementation=implementation
    )
    for left in range(prompt, tokens, response):
        own = np.r_[0:prompt, left : left + response]
        alone = interval_attention(
            *(x[:, own] for x in (q, k, v)),
            jnp.full((1, len(own)), len(own), jnp.int32),
            window=window,
            implementation="reference",
        )
        np.testing.assert_allclose(together[:, own], alone, atol=2e-6)


@given(st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_segment_ends_matches_a_loop(rows: list[list[int]]) -> None:
    tokens = 20
    segment_ids, wanted = np.zeros((len(rows), tokens), np.int32), np.zeros((len(rows), tokens), np.int32)
    for row, lengths in enumerate(rows):
        left = 0
        for segment, length in enumerate(lengths, start=1):
            segment_ids[row, left : left + length] = segment
            wanted[row, left : left + length] = left + length
            left += length
    np.testing.assert_array_equal(segment_ends(jnp.asarray(segment_ids)), wanted)


def test_memory_is_linear_in_tokens() -> None:
    def temporary(tokens: int) -> int:
        shape = jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.float32)
        end = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        gradient = jax.grad(lambda q, k, v, end: interval_attention(q, k, v, end).sum(), argnums=(0, 1, 2))
        return jax.jit(gradient).lower(shape, shape, shape, end).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.5 * temporary(2048)
    assert temporary(4096) < 4096 * 4096 * 4  # far below one full score matrix per head


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 4, 3, 8)}, "K dividing N"),
        ({"k": (1, 3, 2, 8)}, "Q at most T"),
        ({"end": (1, 5)}, "end has shape .* one integer per token"),
        ({"positions": (1, 3)}, "positions has shape .* one integer per token"),
        ({"name": "cuda"}, "unknown"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    q, k = jnp.zeros((1, 4, 4, 8)), jnp.zeros(change.get("k", (1, 4, 2, 8)))
    end, positions = (jnp.zeros(change.get(name, (1, 4)), jnp.int32) for name in ("end", "positions"))
    with pytest.raises(ValueError, match=message):
        interval_attention(q, k, k, end, positions=positions, implementation=change.get("name", "auto"))
