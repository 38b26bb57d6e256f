"""Decoding over shared pages is paged attention, to rounding; it reads them once; and a row's bits are its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.check.flops import Data, matrix_flops
from jaxrl_kernels import group_decode, make_group_plan, make_groups, paged_attention
from jaxrl_kernels.group_decode.cases import CASES, Case
from jaxrl_kernels.paged_attention import blocks
from jaxrl_kernels.paged_attention import tpu as paged
from jaxrl_kernels.paged_attention.backends import BACKENDS as BACKEND_TABLE
from tests.kernels.backends import anywhere
from tests.kernels.pages import exactly, largest_difference, naive, pages_of

BACKENDS = anywhere(BACKEND_TABLE)


def inputs(case: Case) -> tuple[jax.Array, ...]:
    """Queries, pages, table, positions and shared pages of each row; unused pages and table entries hold rubbish."""
    generator = np.random.default_rng(6)
    rows = len(case.groups)
    pages = rows * case.table
    q = generator.normal(size=(rows, 1, case.query_heads, case.head_width))
    pools = generator.normal(size=(2, pages, case.kv_heads, case.page, case.head_width))
    table = generator.permutation(pages).reshape(rows, case.table)
    shared = np.array([case.shared[group] if group >= 0 else 0 for group in case.groups])
    last = np.where(np.array(case.own) > 0, shared * case.page + np.array(case.own) - 1, -1)
    for row, group in enumerate(case.groups):
        table[row, : shared[row]] = table[case.groups.index(group), : shared[row]]
        table[row, max(last[row] // case.page + 1, shared[row]) :] = 10_000
        if last[row] >= 0:
            pools[:, table[row, last[row] // case.page], :, last[row] % case.page + 1 :] = np.nan
    integers = (jnp.asarray(x, jnp.int32) for x in (table, last[:, None], shared))
    return jnp.asarray(q, case.dtype), *(pages_of(pool, case.pages or case.dtype) for pool in pools), *integers


def decode(case: Case, backend: str, q: jax.Array, *arguments: jax.Array) -> jax.Array:
    options = {"window": case.window, "scale": case.scale, "soft_cap": case.soft_cap, "implementation": backend}
    groups = make_groups(arguments[2], arguments[4], case.width)
    return group_decode(q, *arguments[:4], groups, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, backend: str) -> None:
    """At most twice as far from float32 as the naive computation in the same type, as paged attention."""
    arguments, scores = inputs(case), {"window": case.window, "scale": case.scale, "soft_cap": case.soft_cap}
    exact = [exactly(x) for x in arguments[:3]]
    wanted = jax.jit(functools.partial(paged_attention, **scores, implementation="reference"))(*exact, *arguments[3:5])
    rough, _ = jax.jit(functools.partial(naive, **scores))(*arguments[:5])
    got = jax.jit(functools.partial(decode, case, backend))(*arguments)
    assert got.dtype == case.dtype
    assert largest_difference(got, wanted) <= 2 * largest_difference(rough, wanted) + 2e-6
    assert not np.asarray(got, np.float32)[np.array(case.own) == 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_are_joined_as_they_are_in_float32(backend: str) -> None:
    """All 256 weights are 2^-8 and the result 2^-6, so that in bfloat16 nothing is rounded that need be. What either
    part sees, 47 / 144 and -43 / 112, and their log-sum-exps would be."""
    case = Case("exact", (0,), (112,), shared=(9,), page=16, table=16, query_heads=2, kv_heads=1, dtype="bfloat16")
    q, keys, values, *others = inputs(case)
    tokens = np.where(np.arange(256) < 144, np.arange(256) < 47, -1.0 * (np.arange(256) < 144 + 43))
    places = tokens.reshape(16, 1, 16, 1)
    values = values.at[others[0][0]].set(jnp.asarray(np.broadcast_to(places, values[others[0][0]].shape), "bfloat16"))
    got = jax.jit(functools.partial(decode, case, backend))(jnp.zeros_like(q), keys, values, *others)
    np.testing.assert_array_equal(got.astype(jnp.float32), 2.0**-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_that_is_an_argument_chooses_in_the_program(backend: str) -> None:
    arguments = inputs(CASES[1])
    groups, shape = make_groups(arguments[3], arguments[5], 4), blocks.shape_of(*(arguments[i] for i in (0, 1, 3)))

    @jax.jit
    def run(window: jax.Array) -> jax.Array:
        plan = make_group_plan(arguments[4], groups, shape, windows=[5], implementation=backend)
        return group_decode(*arguments[:5], groups, window=window, plan=plan)

    for window in (0, 5):
        wanted = paged_attention(*arguments[:5], window=window)
        np.testing.assert_allclose(run(jnp.int32(window)), wanted, atol=2e-6)


def test_every_row_that_shares_is_in_one_party_of_its_group() -> None:
    generator = np.random.default_rng(1)
    build = jax.jit(make_groups, static_argnames="width")
    for width in (1, 3):
        for _ in range(20):
            first = generator.integers(0, 4, size=11)
            shared = np.where(first == 0, 0, first)
            members = np.asarray(build(jnp.asarray(first[:, None]), jnp.asarray(shared), width=width).members)
            parties = [party[party >= 0] for party in members if party[0] >= 0]
            assert len(parties) == sum(-(-(first == group).sum() // width) for group in (1, 2, 3))
            assert (members[len(parties) :] == -1).all() and all(len(set(first[party])) == 1 for party in parties)
            assert sorted(np.concatenate(parties)) == np.flatnonzero(shared).tolist()


def test_shared_pages_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of the kernel for TPUs are what it reads."""
    case = Case("group", (0,) * 6, (3,) * 6, shared=(8,), width=6)
    monkeypatch.setattr(paged, "blocks_for", lambda kind, shape: blocks.Blocks(shape.count, 16, pages=1))
    q, keys, _, table, positions, shared = inputs(case)
    groups, shape = make_groups(table, shared, case.width), blocks.shape_of(q, keys, table)
    plan = make_group_plan(positions, groups, shape, implementation="tpu_interpreted")
    read = [int(part.lists.steps[0].count) for part in (plan.shared, plan.own)]
    assert read == [8, 6], "the pages of one prompt, and one of each row's own"


def test_cost_is_estimated_by_rows_and_not_by_places_in_parties() -> None:
    q, *arguments = inputs(CASES[0])
    plain = functools.partial(paged_attention, implementation="tpu_interpreted")
    alone = matrix_flops(jax.make_jaxpr(plain)(q, *arguments[:4]), Data(1.0, 0, 0))
    grouped = functools.partial(decode, CASES[0], "tpu_interpreted")
    assert matrix_flops(jax.make_jaxpr(grouped)(q, *arguments), Data(1.0, 0, 0)) <= 2 * alone


@pytest.mark.parametrize(("width", "dtype"), [(4, "float32"), (16, "bfloat16"), (16, "float32")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_is_bit_identical_in_every_slot_and_company(backend: str, width: int, dtype: str) -> None:
    """With a plan and with windows as arguments, as an engine calls it."""
    generator = np.random.default_rng(width)
    slots, page, table, shared, heads, kv_heads, head_width = 16, 16, 20, 9, 4, 2, 24
    own_q = generator.normal(size=(heads, head_width))
    own_pages = generator.normal(size=(2, shared + 2, kv_heads, page, head_width))

    @jax.jit
    def run(q: jax.Array, keys: jax.Array, values: jax.Array, *integers: jax.Array) -> jax.Array:
        table, positions, shared = integers
        groups, shape = make_groups(table, shared, width), blocks.shape_of(q, keys, table)
        plan = make_group_plan(positions, groups, shape, windows=[70], implementation=backend)
        arrays = q, keys, values, table, positions, groups
        each = jax.lax.map(lambda window: group_decode(*arrays, window=window, plan=plan), jnp.asarray([0, 70]))
        return jnp.moveaxis(each, 0, 1)

    results = []
    for slot, mates, others in ((0, 0, 4), (5, 3, 0), (15, 7, 2), (8, 15, 0), (3, 1, 9)):
        q = generator.normal(size=(slots, 1, heads, head_width))
        pools = generator.normal(size=(2, slots * table, kv_heads, page, head_width))
        page_table = generator.permutation(slots * table).reshape(slots, table)
        last = generator.integers(shared * page, table * page, size=slots)
        company = [slot, *generator.permutation(np.delete(np.arange(slots), slot))[:mates]]
        strangers = np.delete(np.arange(slots), company)
        count = np.zeros(slots, np.int32)
        count[company], count[strangers] = shared, others
        page_table[company, :shared] = page_table[slot, :shared]
        if others and len(strangers):
            page_table[strangers, :others] = page_table[strangers[0], :others]
        q[slot, 0], last[slot] = own_q, shared * page + 20
        pools[:, page_table[slot, : shared + 2]] = own_pages
        cast = [jnp.asarray(x, dtype) for x in (q, *pools)]
        output = run(*cast, *(jnp.asarray(x, jnp.int32) for x in (page_table, last[:, None], count)))
        results.append(np.asarray(output.astype(jnp.float32))[slot])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_more_than_one_token_a_row_is_refused() -> None:
    q, *others = inputs(CASES[0])
    with pytest.raises(ValueError, match="one token a row"):
        decode(CASES[0], "xla", q.repeat(2, axis=1), *others)
