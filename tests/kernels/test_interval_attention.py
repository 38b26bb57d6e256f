"""Every backend of interval attention against the reference: the case table, its mask, and memory linear in T."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_kernels import Plan
from jaxrl_kernels.interval_attention import (
    backends,
    cudnn,
    interval_attention,
    interval_attention_with_lse,
    make_plan,
    segment_ends,
)
from jaxrl_kernels.interval_attention.cases import CASES, Case
from jaxrl_kernels.interval_attention.pairs import Blocks, make_pairs
from jaxrl_kernels.interval_attention.tables import make_tables
from jaxrl_kernels.products import product
from jaxrl_kernels.softmax import soft_capped
from tests.kernels import cudnn_stand_in
from tests.kernels.backends import anywhere, of_these_devices, taken

BACKENDS = [name for name in anywhere(backends.BACKENDS) if name != "mosaic_gpu_interpreted"]

# The interpreter of a GPU takes ten seconds a case: the table's kinds of masks and scores, each once.
ON_GPU = ("few_heads", "nothing", "prefix", "bfloat16", "soft_cap", "split_tree_window", "window")

EVERY_CASE = (
    [
        pytest.param(
            case,
            backend,
            id=f"{case.name}-{backend}",
            # Long rows in an interpreter take seconds each; short ones have several blocks there too.
            marks=[pytest.mark.slow] if backend == "tpu_interpreted" and case.tokens > 300 else [],
        )
        for case in CASES
        for backend in BACKENDS
    ]
    + [
        pytest.param(
            case,
            "cudnn",
            id=f"{case.name}-cudnn",
            marks=[cudnn_stand_in.ON_A_CPU, *([pytest.mark.slow] if case.tokens > 100 or case.by_position else [])],
        )
        for case in taken("cudnn", CASES)
    ]
    + [
        pytest.param(
            case,
            "mosaic_gpu_interpreted",
            id=f"{case.name}-mosaic_gpu_interpreted",
            marks=[] if case.name == "few_heads" else [pytest.mark.slow],
        )
        for case in CASES
        if case.name in ON_GPU
    ]
)

HERE = [
    pytest.param(case, backend, id=f"{case.name}-{backend}")
    for backend in of_these_devices(backends.BACKENDS)
    for case in taken(backend, [dataclasses.replace(case, head_width=64, dtype="bfloat16") for case in CASES])
]
"""Where kernels of these devices are tested."""

REPEATED = [(backend, tokens) for backend in BACKENDS for tokens in (24, 300)] + [
    pytest.param("mosaic_gpu_interpreted", 24, marks=pytest.mark.slow),
]
"""Backends, and tokens of a row; without a stand-in, whose bits say nothing of what it stands for."""

EVERY_LENGTH = [*REPEATED, pytest.param("cudnn", 24, marks=cudnn_stand_in.ON_A_CPU)]

cudnn_stand_in.install()

Arrays = tuple[jax.Array, ...]
NAMES = ("output", "log-sum-exp", "q", "k", "v")


def inputs(case: Case) -> Arrays:
    """q, k, v, and cotangents of the output and of the log-sum-exp."""
    generator = np.random.default_rng(3)
    heads = (case.query_heads, case.kv_heads, case.kv_heads, case.query_heads)
    lengths = (case.tokens - case.first, case.tokens, case.tokens, case.tokens - case.first)
    shapes = [(case.batch, length, count, case.head_width) for length, count in zip(lengths, heads, strict=True)]
    given = tuple(jnp.asarray(generator.normal(size=shape), case.dtype) for shape in shapes)
    return (*given, jnp.asarray(generator.normal(size=shapes[0][:3]), jnp.float32))


def plan_of(backend: str, end: jax.Array, queries: int, first: jax.Array, heads: tuple[int, int, int]) -> Plan:
    """With blocks so small that even short rows have several."""
    query_heads, kv_heads, width = heads
    if backend == "tpu_interpreted":
        blocks = Blocks(8, 16) if end.shape[1] < 100 else Blocks(64, 32)
        return Plan(make_pairs(end, queries=queries, first=first, blocks=blocks), backend)
    if backend == "mosaic_gpu_interpreted":
        blocks = Blocks(8, 8) if end.shape[1] < 100 else Blocks(64, 64)
        return Plan(make_tables(end, queries=queries, first=first, blocks=blocks), backend)
    groups = query_heads // kv_heads
    if backend == "cudnn":  # not by make_plan, because these devices are none of its
        return Plan(cudnn.make_plan(end), backend)
    return make_plan(
        end, groups=groups, head_width=width, dtype="bfloat16", queries=queries, first=first, implementation=backend
    )


def naive(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    end: jax.Array,
    window: jax.Array,
    first: jax.Array,
    positions: jax.Array,
    scale: float,
    soft_cap: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention as one writes it down, its operands and weights in the type of its inputs."""
    groups, dtype = q.shape[2] // k.shape[2], q.dtype
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    query, key = first + jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None, :]
    distance = jnp.take(positions, first + jnp.arange(q.shape[1]), axis=1)[:, :, None] - positions[:, None, :]
    visible = ((key <= query) & (query < end[:, None, :]) & ((window == 0) | (distance < window)))[:, None]
    scores = soft_capped(product("btnh,bsnh->bnts", (q * scale).astype(dtype), k), soft_cap).astype(dtype)
    anything = visible.any(axis=-1, keepdims=True)
    scores = jnp.where(visible | ~anything, scores.astype(jnp.float32), -jnp.inf)
    log_total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    weights = jnp.where(anything, jnp.exp(scores - log_total), 0).astype(dtype)
    log_total = jnp.where(anything, log_total, -jnp.inf)[..., 0].swapaxes(1, 2)
    return product("bnts,bsnh->btnh", weights, v).astype(dtype), log_total


@functools.cache
def compiled(backend: str, scale: float | None, soft_cap: float, by_position: bool) -> Callable[..., Arrays]:
    """Output, log-sum-exp and the gradients for q, k and v; what is not of the shape is an argument."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, cotangents: Arrays, *mask: jax.Array) -> Arrays:
        end, window, first, positions = mask

        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            if backend == "naive":
                return naive(q, k, v, *mask, scale or q.shape[3] ** -0.5, soft_cap)
            plan = plan_of(backend, end, q.shape[1], first, (q.shape[2], *k.shape[2:]))
            options = {"window": window, "first": first, "scale": scale, "soft_cap": soft_cap}
            if by_position:
                options["positions"] = positions
            output, log_total = interval_attention_with_lse(q, k, v, end, **options, plan=plan)
            if backend == "cudnn":  # which is not asked for what has to give the log-sum-exp as well
                output = interval_attention(q, k, v, end, **options, plan=plan)
            return output, log_total

        results, pull = jax.vjp(run, q, k, v)
        return (*results, *pull(cotangents))

    return jax.jit(both)


def results_of(case: Case, backend: str, given: Arrays | None = None) -> Arrays:
    q, k, v, *cotangents = inputs(case) if given is None else given
    positions = case.positions()
    if positions is None:
        positions = np.broadcast_to(np.arange(case.tokens, dtype=np.int32), case.ends().shape)
    mask = jnp.asarray(case.ends()), jnp.int32(case.window), jnp.int32(case.first), jnp.asarray(positions)
    return compiled(backend, case.scale, case.soft_cap, case.by_position)(q, k, v, tuple(cotangents), *mask)


def largest_difference(left: jax.Array, right: jax.Array) -> float:
    """Infinities must stand at the same places."""
    left, right = (np.asarray(x.astype(jnp.float32)) for x in (left, right))
    finite = np.isfinite(left)
    np.testing.assert_array_equal(finite, np.isfinite(right))
    return float(np.abs(left[finite] - right[finite]).max(initial=0.0))


@pytest.mark.parametrize(("case", "backend"), EVERY_CASE)
def test_case(case: Case, backend: str) -> None:
    """At most twice as far from float32 as the naive computation in the same type (the rule of FlashAttention), and the
    last bit of the largest number, because that is exact where every query sees one key."""
    wanted = results_of(case, "reference", tuple(x.astype(jnp.float32) for x in inputs(case)))
    plain, got = results_of(case, "naive"), results_of(case, backend)
    for name, exact, rough, ours in zip(NAMES, wanted, plain, got, strict=True):
        assert ours.dtype == (jnp.float32 if name == "log-sum-exp" else case.dtype)
        last_bit = float(jnp.finfo(ours.dtype).eps * jnp.abs(jnp.where(jnp.isfinite(exact), exact, 0)).max())
        error, allowed = largest_difference(ours, exact), 2 * largest_difference(rough, exact) + last_bit + 1e-5
        assert error <= allowed, f"{name} is off by {error}, allowed {allowed}"


@pytest.mark.parametrize(("case", "backend"), HERE)
def test_case_on_these_devices(case: Case, backend: str) -> None:
    test_case(case, backend)


@pytest.mark.parametrize(("backend", "tokens"), EVERY_LENGTH)
def test_rows_that_see_nothing_are_exactly_zero(backend: str, tokens: int) -> None:
    case = Case("padded", "padded", tokens=tokens)
    output, log_total, *gradients = results_of(case, backend)
    hidden = case.ends() == 0
    assert hidden.any()
    assert np.isneginf(np.asarray(log_total)[hidden]).all()
    for array in (output, *gradients):
        assert not np.asarray(array)[hidden].any()
        assert np.isfinite(np.asarray(array)).all()


@pytest.mark.parametrize(("backend", "tokens"), EVERY_LENGTH)
def test_nan_in_padding_reaches_nothing(backend: str, tokens: int) -> None:
    case = Case("padded", "padded", tokens=tokens)
    hidden = case.ends() == 0
    clean = inputs(case)
    spoilt = tuple(jnp.where(hidden.reshape(hidden.shape + (1,) * (x.ndim - 2)), jnp.nan, x) for x in clean)
    for ours, wanted in zip(results_of(case, backend, spoilt), results_of(case, backend, clean), strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize(("backend", "tokens"), REPEATED)
def test_two_runs_are_bitwise_equal(backend: str, tokens: int) -> None:
    case = Case("chunked_segments", "segments", tokens=tokens)
    for first, second in zip(results_of(case, backend), results_of(case, backend), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("cudnn", marks=cudnn_stand_in.ON_A_CPU)])
def test_a_batch_of_calls_is_a_loop_over_them(backend: str) -> None:
    q, k, v, cotangent, _ = (jnp.stack([x, x[::-1]]) for x in inputs(Case("segments", "segments")))
    ends = jnp.stack([jnp.asarray(Case(mask, mask).ends()) for mask in ("segments", "tree")])

    def both(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array, end: jax.Array) -> Arrays:
        plan = plan_of(backend, end, q.shape[1], 0, (*q.shape[2:3], *k.shape[2:]))
        output, pull = jax.vjp(lambda q, k, v: interval_attention(q, k, v, end, plan=plan), q, k, v)
        return output, *pull(cotangent)

    run, given = jax.jit(both), (q, k, v, cotangent, ends)
    alone = [run(*(x[index] for x in given)) for index in range(2)]
    for name, ours, *wanted in zip(NAMES, jax.jit(jax.vmap(both))(*given), *alone, strict=False):
        np.testing.assert_allclose(ours, jnp.stack(wanted), atol=1e-5, err_msg=name)


def test_window_may_be_traced() -> None:
    case = Case("segments", "segments")
    q, k, v, *_ = inputs(case)
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
    q, k, v, *_ = inputs(Case("group", "causal", batch=1, tokens=tokens))
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
        ({"k": (1, 4, 0, 8)}, "nothing empty"),
        ({"end": (1, 5)}, r"end are int32 \(1, 5\); one integer per token needs int32 \(1, 4\)"),
        ({"positions": (1, 3)}, r"positions are int32 \(1, 3\); one integer per token"),
        ({"query_positions": (1, 3)}, r"query_positions are int32 \(1, 3\); one integer per token"),
        ({"name": "cuda"}, "unknown; choose auto, tpu, .*xla"),
        ({"name": "tpu"}, "needs a TPU v5 lite or .*not 'cpu'; choose auto"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    q, k = jnp.zeros((1, 4, 4, 8)), jnp.zeros(change.get("k", (1, 4, 2, 8)))
    names = ("end", "positions", "query_positions")
    end, positions, asked = (jnp.zeros(change.get(name, (1, 4)), jnp.int32) for name in names)
    options = {"positions": positions, "query_positions": asked, "implementation": change.get("name", "auto")}
    with pytest.raises(ValueError, match=message):
        interval_attention(q, k, k, end, **options)


def test_a_plan_for_other_rows_is_refused() -> None:
    q, k, end = jnp.zeros((1, 8, 4, 8)), jnp.zeros((1, 8, 2, 8)), jnp.full((1, 8), 8, jnp.int32)
    plan = make_plan(end, groups=2, head_width=8, dtype="float32", queries=4)
    assert interval_attention(q[:, :4], k, k, end, plan=plan).shape == (1, 4, 4, 8)
    with pytest.raises(ValueError, match=r"the plan was made for Shape\(rows=1, queries=4, .*this is .* \(1, 8, 8, 2"):
        interval_attention(q, k, k, end, plan=plan)
    with pytest.raises(ValueError, match="query_positions are given and positions are not"):
        interval_attention(q, k, k, end, query_positions=end)
