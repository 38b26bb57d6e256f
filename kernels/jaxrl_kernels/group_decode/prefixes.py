"""What parties see of the pages they share, by the backend of paged attention that computes their own pages too."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_kernels.paged_attention import PagedPlan, paged_attention_with_lse
from jaxrl_kernels.paged_attention.backends import chosen
from jaxrl_kernels.paged_attention.blocks import Shape
from jaxrl_kernels.paged_attention.quantized import Pages


def positions_in_parties(members: jax.Array, shared: jax.Array, page: int) -> jax.Array:
    """[X, W] int32: the last token that each member sees of what its party shares; negative where there is none.

    Args:
        members: [X, W] int32, as in ``Groups``.
        shared: [R] int32, as in ``Groups``.
        page: tokens of a page.
    """
    return jnp.where(members >= 0, shared.at[members].get(mode="clip") * page - 1, -1)


def at_once(
    implementation: str,
    q: jax.Array,
    key_pages: Pages,
    value_pages: Pages,
    tables: jax.Array,
    members: jax.Array,
    shared: jax.Array,
    plan: PagedPlan | None,
    options: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:
    """All parties in one call, as rows with a token for every member. For kernels that skip those without members.

    Args:
        q: [R, 1, N, H].
        key_pages: [P, K, page, H], as ``paged_attention`` takes them.
        value_pages: likewise.
        tables: [X, M] int32, the page table of each party.
        members: [X, W] int32, as in ``Groups``.
        shared: [R] int32, as in ``Groups``.
        plan: of ``positions_in_parties``.
        options: scale and soft cap.

    Returns:
        What each row sees of its shared pages [R, 1, N, H], and the log-sum-exp of its scores [R, 1, N]; zeros and
        minus infinity where nothing is shared. Both float32.
    """
    positions = positions_in_parties(members, shared, key_pages.shape[2])
    party = q[:, 0].at[members].get(mode="clip")
    arrays = (party, key_pages, value_pages, tables, positions)
    options = {**options, "queries": len(q), "plan": plan, "implementation": implementation}
    seen, log_total = paged_attention_with_lse(*arrays, **options)
    target = jnp.where(members >= 0, members, len(q))
    by_row = jnp.zeros((len(q), *seen.shape[2:]), jnp.float32).at[target].set(seen, mode="drop")
    logs = jnp.full((len(q), seen.shape[2]), -jnp.inf).at[target].set(log_total, mode="drop")
    return by_row[:, None], logs[:, None]


def one_by_one(
    implementation: str,
    q: jax.Array,
    key_pages: Pages,
    value_pages: Pages,
    tables: jax.Array,
    members: jax.Array,
    shared: jax.Array,
    options: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:
    """``at_once``, a party after the other, as many as there are."""

    def add(party: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        table, own = (jax.lax.dynamic_slice_in_dim(array, party, 1) for array in (tables, members))
        seen, logs = at_once(implementation, q, key_pages, value_pages, table, own, shared, None, options)
        return sums[0] + seen, jnp.maximum(sums[1], logs)  # a row is in one party, and gets zeros from the others

    start = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf)
    return jax.lax.fori_loop(0, (members[:, 0] >= 0).sum(), add, start)


def shape_of_parties(shape: Shape, parties: int, width: int) -> Shape:
    """Of the call for what is shared.

    Args:
        shape: of the decoding rows, which is that of the call for what is each row's own.
        parties: X, as in ``Groups``.
        width: W, likewise.
    """
    return dataclasses.replace(shape, rows=parties, count=width)


def chosen_for_parties(implementation: str, shape: Shape, parties: int, width: int) -> str:
    """Name of the backend that takes both calls. Arguments as ``shape_of_parties``, and:

    Args:
        implementation: as ``paged_attention`` takes it.

    Raises:
        ValueError: as ``paged_attention``.
    """
    return chosen(implementation, shape, shape_of_parties(shape, parties, width))
