"""Every backend of paged attention against the reference, and the promise that a row's bits are its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxrl_kernels.paged_attention import make_paged_plan, paged_attention, paged_attention_with_lse
from jaxrl_kernels.paged_attention.backends import BACKENDS as BACKEND_TABLE
from jaxrl_kernels.paged_attention.blocks import Shape, blocks_for, shape_of
from jaxrl_kernels.paged_attention.cases import CASES, Case
from jaxrl_kernels.paged_attention.quantized import Pages, Scaled
from tests.kernels.backends import anywhere, of_these_devices
from tests.kernels.pages import exactly, largest_difference, naive, pages_of

BACKENDS = anywhere(BACKEND_TABLE)

HERE = [
    pytest.param(
        dataclasses.replace(case, head_width=128, page=128 if case.pages else max(case.page, 16)),
        backend,
        id=f"{case.name}-{backend}",
    )
    for case in CASES
    for backend in of_these_devices(BACKEND_TABLE)
]
"""Where kernels of these devices are tested: every case, as all of them take it."""


def inputs(case: Case) -> tuple[Pages, ...]:
    """Queries, pages, table and positions; unused pages and table entries hold rubbish."""
    generator = np.random.default_rng(5)
    rows = len(case.lengths)
    pages = rows * case.table + 3
    q = generator.normal(size=(rows, case.count, case.query_heads, case.head_width))
    keys, values = generator.normal(size=(2, pages, case.kv_heads, case.page, case.head_width))
    table = generator.permutation(pages)[: rows * case.table].reshape(rows, case.table)
    last = np.asarray(case.lengths)[:, None]
    positions = last - np.arange(case.count)[::-1][None]
    positions = np.where((last < 0) | (positions < 0), -1, positions)
    for row, count in zip(positions, case.counts, strict=False):
        row[: case.count - count] = -1
    for row, length in enumerate(case.lengths):
        table[row, length // case.page + 1 :] = 10_000  # beyond the row: out of range on purpose
    return (
        jnp.asarray(q, case.dtype), *(pages_of(x, case.pages or case.dtype) for x in (keys, values)),
        jnp.asarray(table, jnp.int32), jnp.asarray(positions, jnp.int32),
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, backend: str) -> None:
    """At most twice as far from float32 as the naive computation in the same type (the rule of FlashAttention)."""
    arguments, scores = inputs(case), {"window": case.window, "scale": case.scale, "soft_cap": case.soft_cap}
    run = functools.partial(paged_attention_with_lse, **scores)
    exact_arguments = [exactly(x) for x in arguments[:3]]
    wanted = jax.jit(functools.partial(run, implementation="reference"))(*exact_arguments, *arguments[3:])
    got = jax.jit(functools.partial(run, implementation=backend))(*arguments)
    for exact, rough, ours in zip(wanted, jax.jit(functools.partial(naive, **scores))(*arguments), got, strict=True):
        assert largest_difference(ours, exact) <= 2 * largest_difference(rough, exact) + 1e-5
    assert got[0].dtype == got[1].dtype == jnp.float32
    nobody = np.asarray(arguments[4]) < 0
    assert not np.asarray(got[0], np.float32)[nobody].any() and np.isneginf(np.asarray(got[1])[nobody]).all()


@pytest.mark.parametrize(("case", "backend"), HERE)
def test_case_on_these_devices(case: Case, backend: str) -> None:
    test_case(case, backend)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("slots", "count", "narrow", "windows"),
    [(8, 1, "float8_e4m3fn", ()), (64, 1, "", ()), (4, 24, "", ()), (16, 1, "int8", ()), (16, 1, "", (24,))],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_is_bit_identical_in_every_slot_and_company(
    backend: str, slots: int, count: int, narrow: str, windows: tuple[int, ...], dtype: str
) -> None:
    """Also with a plan for several windows, of which each layer takes its own, as an engine calls it."""
    generator = np.random.default_rng(slots + count)
    page, table, heads, kv_heads, width, length = 16, 20, 4, 2, 24, 37
    pages = slots * table

    @jax.jit
    def run(q: jax.Array, keys: Pages, values: Pages, page_table: jax.Array, positions: jax.Array) -> jax.Array:
        plan = make_paged_plan(positions, shape_of(q, keys, page_table), windows=windows, implementation=backend)
        arrays = q, keys, values, page_table, positions
        return jnp.stack([paged_attention(*arrays, window=window, plan=plan) for window in (0, *windows)], axis=1)

    own_q = generator.normal(size=(count, heads, width))
    own_keys, own_values = generator.normal(size=(2, 3, kv_heads, page, width))
    results = []
    for slot, neighbours in ((0, "short"), (slots - 1, "empty"), (slots // 2, "long"), (1, "long"), (2, "nan")):
        q = generator.normal(size=(slots, count, heads, width))
        keys, values = generator.normal(size=(2, pages, kv_heads, page, width))
        if neighbours == "nan":
            keys[:], values[:] = np.nan, np.nan
        page_table = generator.permutation(pages).reshape(slots, table)
        longest = {"short": 40, "empty": -1, "long": page * table - 1, "nan": 300}[neighbours]
        last = generator.integers(-1, longest, size=slots, endpoint=True)
        last[slot] = length
        q[slot] = own_q
        keys[page_table[slot, :3]], values[page_table[slot, :3]] = own_keys, own_values
        positions = np.maximum(last[:, None] - np.arange(count)[::-1], -1)
        cast = jnp.asarray(q, dtype), *(pages_of(x, narrow or dtype) for x in (keys, values))
        output = run(*cast, jnp.asarray(page_table), jnp.asarray(positions))
        assert output.dtype == dtype
        results.append(np.asarray(output.astype(jnp.float32))[slot])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_one_plan_serves_every_window() -> None:
    """The same bits as of a call by itself; pages before the window are only read where the plan does not know it."""
    *arrays, positions = inputs(Case("long", (600, -1, 40), page=16, table=40))
    shape = shape_of(arrays[0], arrays[1], arrays[3])

    @jax.jit
    def planned(window: jax.Array) -> jax.Array:
        plan = make_paged_plan(positions, shape, windows=[20], implementation="tpu_interpreted")
        return paged_attention(*arrays, positions, window=window, plan=plan)

    alone = jax.jit(lambda window: paged_attention(*arrays, positions, window=window, implementation="tpu_interpreted"))
    for window in (0, 20, 300):
        np.testing.assert_array_equal(planned(jnp.int32(window)), alone(jnp.int32(window)))
    lists = make_paged_plan(positions, shape, windows=[20], implementation="tpu_interpreted").lists
    assert [int(lists.steps_of(jnp.int32(window)).count) for window in (0, 20, 300)] == [3, 2, 3]


@pytest.mark.parametrize("narrow", ["", "int8"])
def test_time_follows_the_longest_row_and_not_the_table(narrow: str) -> None:
    """The loop's length is data: rows of one block run one round of it, whatever the table could hold. No more than a
    block of narrow pages is made floats of."""
    case = Case("wide", (5, 3), page=16, table=64, pages=narrow)
    arguments = inputs(case)
    text = jax.jit(paged_attention).lower(*arguments).as_text()
    assert "stablehlo.while" in text
    sizes = [int(np.prod(aval.shape)) for aval in _intermediates(paged_attention, *arguments)]
    gathered_whole = len(case.lengths) * case.table * case.page * case.kv_heads * case.head_width
    assert max(sizes) < max(gathered_whole // 4, max(x.size for x in jax.tree.leaves(arguments)) + 1)
    floating = [x for x in _intermediates(paged_attention, *arguments) if x.dtype in (jnp.float32, jnp.bfloat16)]
    assert not narrow or max(int(np.prod(x.shape)) for x in floating) < gathered_whole // 4


def _intermediates(function: object, *arguments: jax.Array) -> list[jax.core.ShapedArray]:
    def walk(jaxpr: object) -> list[jax.core.ShapedArray]:
        found = []
        for equation in jaxpr.eqns:
            found += [variable.aval for variable in equation.outvars]
            for sub in jaxprs_in_params(equation.params):
                found += walk(sub)
        return found

    return walk(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_what_the_tpu_kernel_cannot_take_is_said() -> None:
    fitting = Shape(64, 1, 32, 8, 128, 16, 1024, "bfloat16", "bfloat16")
    assert not BACKEND_TABLE["tpu"].unfit(fitting)
    for change, reason in (({"page": 8}, "multiple of 16"), ({"head_width": 64}, "128"), ({"rows": 128}, "larger")):
        assert reason in BACKEND_TABLE["tpu"].unfit(dataclasses.replace(fitting, **change))
    narrow = dataclasses.replace(fitting, page_dtype="int8", page=128, table=128)
    assert not BACKEND_TABLE["tpu"].unfit(narrow)
    assert "64 tokens in int8 is no multiple of 128" in BACKEND_TABLE["tpu"].unfit(dataclasses.replace(narrow, page=64))


@pytest.mark.parametrize(("count", "heads", "width"), [(128, 32, 128), (256, 32, 128), (256, 16, 256), (1, 64, 256)])
def test_blocks_of_many_kv_heads_fit_into_the_vector_memory(count: int, heads: int, width: int) -> None:
    shape = Shape(4, count, heads, heads, width, 16, 128, "bfloat16", "bfloat16")
    blocks = blocks_for("TPU v5", shape)
    pages = 4 * blocks.pages * shape.page * heads * width * 2
    queries = blocks.rows * heads * (width * (2 * 2 + 2 * 4 + 4) + 128 * 4 * 4)  # with results, sums and log-sum-exps
    assert pages + queries < 14 << 20
    assert not BACKEND_TABLE["tpu"].unfit(shape)
    assert "smaller pages" in BACKEND_TABLE["tpu"].unfit(dataclasses.replace(shape, page=1024))


def test_pages_and_scales_that_do_not_go_together_are_named() -> None:
    shape, scales = (4, 2, 2, 8), jnp.ones((4, 2, 2))
    plain, int8, float8 = (jnp.zeros(shape, dtype) for dtype in ("float32", "int8", "float8_e4m3fn"))
    arguments = jnp.zeros((2, 2), jnp.int32), jnp.zeros((2, 1), jnp.int32)
    for keys, values, message in (
        (int8, int8, "key pages of int8 have no scales"),
        (plain.astype("int16"), plain, "key pages of int16 cannot be had; they are float32, bfloat16, float16 or"),
        (plain, plain.astype("float8_e5m2"), "value pages of float8_e5m2 cannot be had"),
        (Scaled(int8, scales), int8, "value pages of int8 have no scales"),
        (Scaled(plain, scales), plain, "key pages of float32 have scales; only int8 and float8_e4m3fn"),
        (Scaled(int8, scales), plain, "key pages of int8 and value pages of float32"),
        (Scaled(int8, scales), Scaled(float8, scales), "key pages of int8 and value pages of float8_e4m3fn"),
        (Scaled(int8, scales[:, 0]), Scaled(int8, scales), r"need float32 scales \(4, 2, 2\); got float32 \(4, 2\)"),
        (Scaled(int8, scales.astype("bfloat16")), Scaled(int8, scales), "got bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(jnp.zeros((2, 1, 4, 8)), keys, values, *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pages": (4, 3, 2, 8)}, "K dividing N"),
        ({"table": (3, 2)}, "page table"),
        ({"name": "cuda"}, "unknown"),
        ({"name": "tpu"}, "needs a TPU"),
        ({"planned_rows": 3}, "made for Shape.rows=3"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    pages = jnp.zeros(change.get("pages", (4, 2, 2, 8)))
    table, positions = jnp.zeros(change.get("table", (2, 2)), jnp.int32), jnp.zeros((2, 1), jnp.int32)
    q, plan = jnp.zeros((2, 1, 4, 8)), None
    if "planned_rows" in change:
        plan = make_paged_plan(positions, dataclasses.replace(shape_of(q, pages, table), rows=change["planned_rows"]))
    with pytest.raises(ValueError, match=message):
        paged_attention(q, pages, pages, table, positions, plan=plan, implementation=change.get("name", "auto"))
