"""Decoding in which rows that share the first pages of their tables read these once for all: a group and its prompt.

The queries of a group's rows are one matrix against the shared pages; what follows is each row's own; the two are
joined by their log-sum-exps. What is read falls by G(P + R) / (P + GR) for groups of G rows with P shared tokens and R
of their own.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrl_kernels.group_decode.prefixes import (
    at_once,
    chosen_for_parties,
    one_by_one,
    positions_in_parties,
    shape_of_parties,
)
from jaxrl_kernels.paged_attention import PagedPlan, make_paged_plan, paged_attention, paged_attention_with_lse
from jaxrl_kernels.paged_attention.backends import BACKENDS
from jaxrl_kernels.paged_attention.blocks import Shape, shape_of
from jaxrl_kernels.paged_attention.quantized import Pages
from jaxrl_kernels.softmax import MASKED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """Which rows read their first pages together: made once for a page table, for all layers and steps.

    Attributes:
        members: [X, W] int32, the rows of each party; -1 = none. Parties that have no row come last.
        shared: [R] int32, how many of a row's first pages its party shares; 0 = the row is in no party.
        party_tables: [X, M] int32, the page table of each party.
        own_tables: [R, M] int32, that of what a row has behind the pages it shares.
    """

    members: jax.Array
    shared: jax.Array
    party_tables: jax.Array
    own_tables: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Which pages a step of decoding needs, and who computes it: made once for its positions, for all layers.

    Attributes:
        shared: of what parties share.
        own: of what follows.
        windowed: of whole rows, for layers with a window; None = there are none.
    """

    shared: PagedPlan
    own: PagedPlan
    windowed: PagedPlan | None = None


def make_groups(page_table: jax.Array, shared: jax.Array, width: int) -> Groups:
    """Put rows into parties whose first page is the same one.

    A row that shares its pages with nobody present is a party by itself: who else is there changes neither what a row
    computes nor in which order it is summed up.

    Args:
        page_table: [R, M] int32. Rows with the same first page share as many pages, and these are the same ones.
        shared: [R] int32, how many of a row's first pages others may have as well; 0 = none.
        width: W, the most rows of a party; a larger group is several of them.
    """
    rows = len(shared)
    row, first = jnp.arange(rows, dtype=jnp.int32), page_table[:, 0]
    same = (shared > 0)[:, None] & (shared > 0) & (first[:, None] == first)
    rank = jnp.where(same & (row < row[:, None]), 1, 0).sum(axis=1)
    leads = (shared > 0) & (rank % width == 0)
    leader = jnp.where(same & leads & (row <= row[:, None]), row, -1).max(axis=1)  # the last one before the row
    party = jnp.where(shared > 0, (jnp.cumsum(leads) - 1)[leader], rows)
    members = jnp.full((rows, width), -1, jnp.int32).at[party, rank % width].set(row, mode="drop")
    column = jnp.arange(page_table.shape[1], dtype=jnp.int32) + shared[:, None]
    own_tables = jnp.take_along_axis(page_table, column, axis=1, mode="clip")
    return Groups(members, shared, page_table.at[members[:, 0]].get(mode="clip"), own_tables)


def make_group_plan(
    positions: jax.Array,
    groups: Groups,
    shape: Shape,
    *,
    windows: Sequence[int] = (),
    implementation: str = "auto",
) -> GroupPlan:
    """The plan of a step of decoding.

    Args:
        positions: [R, 1] int32, as ``group_decode`` takes them.
        groups: likewise.
        shape: of the rows, on each device.
        windows: of the layers that have one.
        implementation: as ``paged_attention`` takes it.

    Raises:
        ValueError: as ``paged_attention``.
    """
    parties, width = groups.members.shape
    name = chosen_for_parties(implementation, shape, parties, width)
    shared = positions_in_parties(groups.members, groups.shared, shape.page)
    windowed = make_paged_plan(positions, shape, windows=windows, implementation=implementation) if windows else None
    return GroupPlan(
        make_paged_plan(shared, shape_of_parties(shape, parties, width), implementation=name),
        make_paged_plan(_own_positions(positions, groups, shape.page), shape, implementation=name),
        windowed,
    )


def _own_positions(positions: jax.Array, groups: Groups, page: int) -> jax.Array:
    """Positions behind what a row shares."""
    return jnp.where(positions >= 0, positions - groups.shared[:, None] * page, -1)


def group_decode(
    q: jax.Array,
    key_pages: Pages,
    value_pages: Pages,
    page_table: jax.Array,
    positions: jax.Array,
    groups: Groups,
    *,
    window: int | jax.Array = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
    first_page: int | jax.Array = 0,
    plan: GroupPlan | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """``paged_attention`` of one new token a row, to float32 rounding.

    With a window a row sees little of what is shared, and nothing of it once its own tokens fill the window: it is then
    computed by ``paged_attention``.

    Args:
        q: [R, 1, N, H] queries.
        key_pages: [P, K, page, H], as ``paged_attention`` takes them.
        value_pages: likewise.
        page_table: [R, M] int32, the pages of each row in order.
        positions: [R, 1] int32, as ``paged_attention`` takes them. A row's token lies beyond the pages it shares.
        groups: of this page table, from ``make_groups``.
        window: as ``paged_attention`` takes it.
        scale: likewise.
        soft_cap: likewise.
        first_page: of the pages that the tables number from 0 on, where they are a layer's in a pool of several. An int
            or a traced int32.
        plan: ``make_group_plan`` of ``positions`` and ``groups``, for all layers of a step; made here when None.
        implementation: as ``paged_attention`` takes it. A plan that is given has picked already.

    Returns:
        [R, 1, N, H] in q's type.

    Raises:
        ValueError: a row has more than one token, or as ``paged_attention``.
    """
    if q.shape[1] != 1:
        raise ValueError(f"q {q.shape} [R, C, N, H] has C={q.shape[1]}; a group decodes one token a row")
    arrays = (q, key_pages, value_pages, page_table + first_page, positions)
    options = {"scale": scale, "soft_cap": soft_cap, "implementation": implementation}

    def windowed() -> jax.Array:
        return paged_attention(*arrays, window=window, plan=None if plan is None else plan.windowed, **options)

    def joined() -> jax.Array:
        return _joined(*arrays, groups, first_page, plan, **options)

    if isinstance(window, int):
        return windowed() if window else joined()
    return jax.lax.cond(window > 0, windowed, joined)


def _joined(
    q: jax.Array,
    key_pages: Pages,
    value_pages: Pages,
    page_table: jax.Array,
    positions: jax.Array,
    groups: Groups,
    first_page: int | jax.Array,
    plan: GroupPlan | None,
    *,
    scale: float | None,
    soft_cap: float,
    implementation: str,
) -> jax.Array:
    """Both parts of every row, and their weighted mean."""
    if plan is None:
        shape = shape_of(q, key_pages, page_table)
        plan = make_group_plan(positions, groups, shape, implementation=implementation)
    pages, options = (key_pages, value_pages), {"scale": scale, "soft_cap": soft_cap}
    tables = groups.party_tables + first_page
    name, arrays = plan.shared.backend, (q, *pages, tables, groups.members, groups.shared)
    if BACKENDS[name].skips_empty:
        first, first_log = at_once(name, *arrays, plan.shared, options)
    else:
        first, first_log = one_by_one(name, *arrays, options)
    own_arrays = (q, *pages, groups.own_tables + first_page, _own_positions(positions, groups, key_pages.shape[2]))
    own, own_log = paged_attention_with_lse(*own_arrays, plan=plan.own, **options)
    top = jnp.maximum(jnp.maximum(first_log, own_log), MASKED)  # finite also where there is nothing
    first_weight, own_weight = jnp.exp(first_log - top)[..., None], jnp.exp(own_log - top)[..., None]
    there = (positions >= 0)[..., None, None]
    both = jnp.where(there, first_weight + own_weight, 1.0)
    return jnp.where(there, (first_weight * first + own_weight * own) / both, 0.0).astype(q.dtype)
