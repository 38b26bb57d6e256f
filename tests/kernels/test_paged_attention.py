"""Every backend of paged attention against the reference, and the promise that a row's bits are its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxrl_kernels.paged_attention import paged_attention
from jaxrl_kernels.paged_attention.cases import CASES, Case

BACKENDS = ("xla",)


def inputs(case: Case) -> tuple[jax.Array, ...]:
    """Queries, pages, table and positions; unused pages and table entries hold rubbish."""
    generator = np.random.default_rng(5)
    rows = len(case.lengths)
    pages = rows * case.table + 3
    q = generator.normal(size=(rows, case.count, case.query_heads, case.head_width))
    keys, values = generator.normal(size=(2, pages, case.page, case.kv_heads, case.head_width))
    table = generator.permutation(pages)[: rows * case.table].reshape(rows, case.table)
    last = np.asarray(case.lengths)[:, None]
    positions = last - np.arange(case.count)[::-1][None]
    positions = np.where((last < 0) | (positions < 0), -1, positions)
    for row, length in enumerate(case.lengths):
        table[row, length // case.page + 1 :] = 10_000  # beyond the row: out of range on purpose
    return (
        jnp.asarray(q, case.dtype), jnp.asarray(keys, case.dtype), jnp.asarray(values, case.dtype),
        jnp.asarray(table, jnp.int32), jnp.asarray(positions, jnp.int32),
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, backend: str) -> None:
    arguments = inputs(case)
    run = functools.partial(paged_attention, window=case.window, scale=case.scale, soft_cap=case.soft_cap)
    exact_arguments = [x.astype(jnp.float32) for x in arguments[:3]]
    wanted = jax.jit(functools.partial(run, implementation="reference"))(*exact_arguments, *arguments[3:])
    got = jax.jit(functools.partial(run, implementation=backend))(*arguments)
    assert got.dtype == case.dtype
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, atol=2e-5 if case.dtype == "float32" else 2e-2)
    assert not np.asarray(got, np.float32)[np.asarray(arguments[4]) < 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("slots", "count"), [(8, 1), (16, 1), (64, 1), (4, 24)])
def test_a_row_is_bit_identical_in_every_slot_and_company(backend: str, dtype: str, slots: int, count: int) -> None:
    generator = np.random.default_rng(slots + count)
    page, table, heads, kv_heads, width, length = 16, 20, 4, 2, 24, 37
    pages = slots * table
    run = jax.jit(functools.partial(paged_attention, implementation=backend))
    own_q = generator.normal(size=(count, heads, width))
    own_keys, own_values = generator.normal(size=(2, 3, page, kv_heads, width))
    results = []
    for slot, neighbours in ((0, "short"), (slots - 1, "empty"), (slots // 2, "long"), (1, "long"), (2, "nan")):
        q = generator.normal(size=(slots, count, heads, width))
        keys, values = generator.normal(size=(2, pages, page, kv_heads, width))
        if neighbours == "nan":
            keys[:], values[:] = np.nan, np.nan
        page_table = generator.permutation(pages).reshape(slots, table)
        longest = {"short": 40, "empty": -1, "long": page * table - 1, "nan": 300}[neighbours]
        last = generator.integers(-1, longest, size=slots, endpoint=True)
        last[slot] = length
        q[slot] = own_q
        keys[page_table[slot, :3]], values[page_table[slot, :3]] = own_keys, own_values
        positions = np.maximum(last[:, None] - np.arange(count)[::-1], -1)
        cast = [jnp.asarray(x, dtype) for x in (q, keys, values)]
        output = run(*cast, jnp.asarray(page_table), jnp.asarray(positions))
        results.append(np.asarray(output.astype(jnp.float32))[slot])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_time_follows_the_longest_row_and_not_the_table() -> None:
    """The loop's length is data: rows of one block run one round of it, whatever the table could hold."""
    case = Case("wide", (5, 3), page=16, table=64)
    arguments = inputs(case)
    text = jax.jit(paged_attention).lower(*arguments).as_text()
    assert "stablehlo.while" in text
    sizes = [int(np.prod(aval.shape)) for aval in _intermediates(paged_attention, *arguments)]
    gathered_whole = len(case.lengths) * case.table * case.page * case.kv_heads * case.head_width
    assert max(sizes) < max(gathered_whole // 4, max(x.size for x in arguments) + 1)


def _intermediates(function: object, *arguments: jax.Array) -> list[jax.core.ShapedArray]:
    def walk(jaxpr: object) -> list[jax.core.ShapedArray]:
        found = []
        for equation in jaxpr.eqns:
            found += [variable.aval for variable in equation.outvars]
            for sub in jaxprs_in_params(equation.params):
                found += walk(sub)
        return found

    return walk(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"pages": (4, 2, 3, 8)}, "K dividing N"), ({"table": (3, 2)}, "page table"), ({"name": "cuda"}, "unknown")],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    pages = jnp.zeros(change.get("pages", (4, 2, 2, 8)))
    table, positions = jnp.zeros(change.get("table", (2, 2)), jnp.int32), jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(ValueError, match=message):
        paged_attention(
            jnp.zeros((2, 1, 4, 8)), pages, pages, table, positions, implementation=change.get("name", "auto")
        )
