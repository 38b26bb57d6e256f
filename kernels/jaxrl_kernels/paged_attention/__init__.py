"""Attention of new tokens over the KV pages of their row: decoding (C = 1) and chunked prefill (C > 1).

Token p of a row has its key and value at ``pages[page_table[row, p // page], :, p % page]``: a page holds one KV head
after the other, so that a head's part of it lies in one piece.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_kernels.paged_attention.backends import BACKENDS, chosen
from jaxrl_kernels.paged_attention.blocks import Options, Shape, shape_of
from jaxrl_kernels.paged_attention.quantized import Pages, check_pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedPlan:
    """Which pages the queries of a call need, and who computes it: made once for their positions, for all layers.

    Attributes:
        lists: arrays as the backend wants them.
        shape: of the calls.
        backend: name of the backend.
    """

    lists: Any
    shape: Shape = dataclasses.field(metadata={"static": True})
    backend: str = dataclasses.field(metadata={"static": True})


def make_paged_plan(
    positions: jax.Array, shape: Shape, *, windows: Sequence[int] = (), implementation: str = "auto"
) -> PagedPlan:
    """The plan of calls with these positions, for every window.

    Args:
        positions: [R, C] int32, as ``paged_attention`` takes them.
        shape: of the calls, on each device.
        windows: for which pages before a window are left out; calls with other windows read what they do not see.
        implementation: as ``paged_attention`` takes it.

    Raises:
        ValueError: as ``paged_attention``.
    """
    name = chosen(implementation, shape)
    return PagedPlan(BACKENDS[name].plan(positions, (0, *windows), shape), shape, name)


def paged_attention(
    q: jax.Array,
    key_pages: Pages,
    value_pages: Pages,
    page_table: jax.Array,
    positions: jax.Array,
    *,
    window: int | jax.Array = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
    plan: PagedPlan | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Attend, softmax in float32; the new tokens' own keys are already in the pages.

    A row's result depends, bit for bit, on that row's queries, positions and visible keys and values only: not on the
    other rows, on which slot it is in, on which pages hold its tokens, or on how far other rows reach. What lies in
    pages beyond the last position of a row's queries, NaN included, has no influence; what lies between a query's
    position and that one, or before its window, has none as long as the values are finite.

    Args:
        q: [R, C, N, H] queries.
        key_pages: [P, K, page, H], in a type of 8 bits as ``quantized.Scaled`` with scales [P, K, page].
        value_pages: likewise, in the same type.
        page_table: [R, M] int32, the pages of each row in order; entries beyond the row's length may hold anything.
        positions: [R, C] int32, position of each query in its row; it sees the tokens at 0 ... position. Negative means
            there is no token: the result is zeros. Rows may have different numbers of tokens: decoding and prefill
            go together in one call.
        window: a query also needs ``position - key position < window``; 0 = no window. An int or a traced int32.
        scale: of the scores; ``H ** -0.5`` when None.
        soft_cap: scaled scores become ``soft_cap * tanh(score / soft_cap)``; 0 = they stay.
        plan: ``make_paged_plan`` of ``positions``, for tokens that attend more than once; made here when None.
        implementation: "xla" is plain JAX, its time proportional to the longest row; "tpu" the kernel for TPUs, its
            time proportional to the tokens that are seen; "tpu_interpreted" that one without a TPU, slowly;
            "reference" gathers whole tables; "auto" picks by the devices (``docs/kernels.md``). A plan that is given
            has picked already.

    Returns:
        [R, C, N, H] in q's type.

    Raises:
        ValueError: shapes do not fit together or to the plan, pages of 8 bits have no scales or others have, or the
            implementation is unknown or cannot be had.
    """
    arrays = (q, key_pages, value_pages, page_table, positions)
    options = {"window": window, "scale": scale, "soft_cap": soft_cap, "plan": plan, "implementation": implementation}
    return _attend(*arrays, **options, queries=None, with_lse=False)[0]


def paged_attention_with_lse(
    q: jax.Array,
    key_pages: Pages,
    value_pages: Pages,
    page_table: jax.Array,
    positions: jax.Array,
    *,
    window: int | jax.Array = 0,
    scale: float | None = None,
    soft_cap: float = 0.0,
    queries: int | None = None,
    plan: PagedPlan | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """``paged_attention``, and the log-sum-exp of each query's scores, by which parts of a row can be joined.

    ``queries`` is how many of R * C there are, at most, where positions leave most of them out: estimates of cost count
    them, and nothing else does.

    Returns:
        ([R, C, N, H], [R, C, N] and minus infinity where there is no token), both in float32: what is joined is rounded
        once, and not part by part.
    """
    arrays = (q, key_pages, value_pages, page_table, positions)
    options = {"window": window, "scale": scale, "soft_cap": soft_cap, "plan": plan, "implementation": implementation}
    output, log_total = _attend(*arrays, **options, queries=queries, with_lse=True)
    assert log_total is not None
    return output, log_total


def _attend(
    q: jax.Array,
    key_pages: Pages,
    value_pages: Pages,
    page_table: jax.Array,
    positions: jax.Array,
    *,
    window: int | jax.Array,
    scale: float | None,
    soft_cap: float,
    plan: PagedPlan | None,
    implementation: str,
    queries: int | None,
    with_lse: bool,
) -> tuple[jax.Array, jax.Array | None]:
    rows, count, heads, width = q.shape
    check_pages(key_pages, value_pages)
    if key_pages.shape != value_pages.shape or key_pages.shape[3] != width or heads % key_pages.shape[1]:
        raise ValueError(
            f"q {q.shape} [R, C, N, H] needs key and value pages of one shape [P, K, page, H] with K dividing N; "
            f"got {key_pages.shape}, {value_pages.shape}"
        )
    if page_table.shape[0] != rows or positions.shape != (rows, count):
        raise ValueError(
            f"q {q.shape} needs a page table [{rows}, M] and positions [{rows}, {count}]; "
            f"got {page_table.shape}, {positions.shape}"
        )
    shape, window = shape_of(q, key_pages, page_table), jnp.asarray(window, jnp.int32)
    if plan is None:
        name = chosen(implementation, shape)
        plan = PagedPlan(BACKENDS[name].plan(positions, (window,), shape), shape, name)
    if plan.shape != shape:
        raise ValueError(f"the plan was made for {plan.shape}, and this is {shape}")
    queries = rows * count if queries is None else queries
    options = Options(width**-0.5 if scale is None else scale, soft_cap, with_lse, queries)
    attend = BACKENDS[plan.backend].attend
    return attend(q, key_pages, value_pages, page_table, positions, window, options, plan.lists)
