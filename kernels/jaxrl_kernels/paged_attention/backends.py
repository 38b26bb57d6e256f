"""The table of backends, and which of them runs where. A new one is a file and a row here."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxrl_kernels import choice
from jaxrl_kernels.paged_attention import reference, tpu, xla
from jaxrl_kernels.paged_attention.blocks import LANES, VECTOR_BYTES, Shape, blocks_for, tile_rows, vector_bytes
from jaxrl_kernels.paged_attention.quantized import is_narrow

SCALARS = 1 << 17
"""Entries of the page table and of the list of steps together: half of the scalar memory of a TPU, which has 1 MiB."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to compute paged attention.

    Attributes:
        attend: ``(q, key_pages, value_pages, page_table, positions, window, options, the plan)`` -> what is
            attended to [R, C, N, H] in q's type and None, or in float32 and the log-sum-exp [R, C, N] if that is asked
            for.
        plan: ``(positions, windows, shape)`` -> what ``attend`` needs to know of where queries are, a tree of arrays.
            A call may have any window if the first of them is 0, and otherwise the only one of them.
        devices: beginnings of the kinds of device, as jax says them, that it runs on.
        unfit: why it cannot take a shape, empty if it can.
        blocks: in which blocks it computes a shape, empty where nothing but the backend decides that.
        automatic: "auto" may take it.
        plain: it is plain JAX, by which others are judged.
        skips_empty: rows and places of a row without a token cost no time, so that all parties of decoding groups go in
            one call, and "auto" lets groups decode together.
    """

    attend: Callable[..., tuple[jax.Array, jax.Array | None]]
    plan: Callable[[jax.Array, Sequence[int | jax.Array], Shape], Any] = lambda positions, windows, shape: ()
    devices: tuple[str, ...] = ("",)
    unfit: Callable[[Shape], str] = lambda shape: ""
    blocks: Callable[[Shape], str] = lambda shape: ""
    automatic: bool = False
    plain: bool = False
    skips_empty: bool = False


def _unfit_for_tpu(shape: Shape) -> str:
    rows = LANES if is_narrow(shape.page_dtype) else tile_rows(shape.page_dtype)  # scales lie along the lanes
    if shape.page % rows:
        return f"a page of {shape.page} tokens in {shape.page_dtype} is no multiple of {rows}"
    if shape.head_width % LANES:
        return f"a head of width {shape.head_width} is no multiple of {LANES}"
    held = vector_bytes(shape, blocks_for(choice.device_kind(), shape))
    if held > VECTOR_BYTES:
        return (
            f"{shape.kv_heads} KV heads of width {shape.head_width} in pages of {shape.page} tokens hold {held:,} "
            f"bytes of {VECTOR_BYTES:,}{'; smaller pages hold fewer' if shape.page > rows else ''}"
        )
    entries = shape.rows * shape.table + tpu.longest_list(shape)
    if entries > SCALARS:
        return f"{shape.rows} rows of {shape.table} pages need {entries} entries of {SCALARS}; larger pages need fewer"
    return ""


def _blocks_on_tpu(shape: Shape) -> str:
    blocks = blocks_for(choice.device_kind(), shape)
    return f"{blocks.rows} rows of scores by {blocks.pages} pages"


BACKENDS: dict[str, Backend] = {
    "tpu": Backend(
        tpu.paged_attention,
        tpu.lists_for,
        choice.TPUS,
        unfit=_unfit_for_tpu,
        blocks=_blocks_on_tpu,
        automatic=True,
        skips_empty=True,
    ),
    "xla": Backend(xla.paged_attention, automatic=True, plain=True),
    "tpu_interpreted": Backend(functools.partial(tpu.paged_attention, interpret=True), tpu.lists_for, skips_empty=True),
    "reference": Backend(reference.paged_attention, plain=True),
}
"""By the name that ``implementation`` gives, in the order in which "auto" tries those that it may take. The interpreted
one is for tests on machines without a TPU."""


def chosen(implementation: str, *shapes: Shape) -> str:
    """Name of the backend for shapes on the devices at hand, as ``choice.chosen`` finds it."""
    return choice.chosen(BACKENDS, implementation, shapes, "paged attention")
