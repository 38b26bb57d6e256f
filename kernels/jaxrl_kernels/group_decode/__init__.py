"""Decoding in which rows that share the first pages of their tables read these once for all: a group and its prompt.

The queries of a group's rows are one matrix against the shared pages; what follows is each row's own; the two are
joined by their log-sum-exps. What is read falls by G(P + R) / (P + GR) for groups of G rows with P shared tokens and R
of their own.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl_kernels.group_decode.backends import PREFIXES, chosen_for_parties
from jaxrl_kernels.paged_attention import paged_attention, paged_attention_with_lse
from jaxrl_kernels.paged_attention.backends import Implementation
from jaxrl_kernels.paged_attention.blocks import shape_of
from jaxrl_kernels.softmax import MASKED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """Which rows read their first pages together: made once for a page table, for all layers and steps.

    Attributes:
        members: [X, W] int32, the rows of each party; -1 = none. Parties that have no row come last.
        shared: [R] int32, how many of a row's first pages its party shares; 0 = the row is in no party.
    """

    members: jax.Array
    shared: jax.Array


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
    return Groups(members, shared)


def group_decode(
    q: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    groups: Groups,
    *,
    window: int | jax.Array = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
    implementation: Implementation = "auto",
) -> jax.Array:
    """``paged_attention`` of one new token a row, to float32 rounding.

    With a window a row sees little of what is shared, and nothing of it once its own tokens fill the window: it is then
    computed by ``paged_attention``.

    Args:
        q: [R, 1, N, H] queries.
        key_pages: [P, K, page, H].
        value_pages: [P, K, page, H].
        page_table: [R, M] int32, the pages of each row in order.
        positions: [R, 1] int32, as ``paged_attention`` takes them. A row's token lies beyond the pages it shares.
        groups: of this page table, from ``make_groups``.
        window: as ``paged_attention`` takes it.
        scale: likewise.
        soft_cap: likewise.
        implementation: likewise.

    Returns:
        [R, 1, N, H] in q's type.

    Raises:
        ValueError: a row has more than one token, or as ``paged_attention``.
    """
    if q.shape[1] != 1:
        raise ValueError(f"q {q.shape} [R, C, N, H] has C={q.shape[1]}; a group decodes one token a row")
    arrays = (q, key_pages, value_pages, page_table, positions)
    options = {"scale": scale, "soft_cap": soft_cap, "implementation": implementation}
    if isinstance(window, int):
        return paged_attention(*arrays, window=window, **options) if window else _joined(*arrays, groups, **options)
    return jax.lax.cond(
        window > 0,
        lambda: paged_attention(*arrays, window=window, **options),
        lambda: _joined(*arrays, groups, **options),
    )


def _joined(
    q: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
    groups: Groups,
    *,
    scale: float | None,
    soft_cap: float,
    implementation: Implementation,
) -> jax.Array:
    """Both parts of every row, and their weighted mean."""
    page, shared = key_pages.shape[2], groups.shared[:, None]
    pages, options = (key_pages, value_pages), {"scale": scale, "soft_cap": soft_cap}
    name = chosen_for_parties(implementation, shape_of(q, key_pages, page_table), *groups.members.shape)
    first, first_log = PREFIXES[name](q, *pages, page_table, groups.members, groups.shared, options)
    column = jnp.arange(page_table.shape[1], dtype=jnp.int32) + shared
    own_table = jnp.take_along_axis(page_table, column, axis=1, mode="clip")
    own_position = jnp.where(positions >= 0, positions - shared * page, -1)
    own, own_log = paged_attention_with_lse(q, *pages, own_table, own_position, **options, implementation=name)
    top = jnp.maximum(jnp.maximum(first_log, own_log), MASKED)  # finite also where there is nothing
    first_weight, own_weight = jnp.exp(first_log - top)[..., None], jnp.exp(own_log - top)[..., None]
    there = (positions >= 0)[..., None, None]
    both = jnp.where(there, first_weight + own_weight, 1.0)
    return jnp.where(there, (first_weight * first + own_weight * own) / both, 0.0).astype(q.dtype)
