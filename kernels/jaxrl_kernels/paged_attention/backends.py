"""The table of backends, and which of them runs where. A new one is a file and a row here."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Literal

import jax

from jaxrl_kernels.interval_attention.backends import device_kind
from jaxrl_kernels.paged_attention import reference, tpu, xla
from jaxrl_kernels.paged_attention.blocks import LANES, Shape, tile_rows

Implementation = Literal["auto", "xla", "tpu", "tpu_interpreted", "reference"]

SCALARS = 1 << 17
"""Entries of the page table and of the list of steps together: half of the scalar memory of a TPU, which has 1 MiB."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to compute paged attention.

    Attributes:
        attend: ``(q, key_pages, value_pages, page_table, positions, window, options)`` -> what is
            attended to [R, C, N, H] in q's type and None, or in float32 and the log-sum-exp [R, C, N] if that is asked
            for.
        devices: beginning of the kinds of device, as jax says them, that it runs on; empty = all.
        unfit: why it cannot take a shape, empty if it can.
    """

    attend: Callable[..., tuple[jax.Array, jax.Array | None]]
    devices: str = ""
    unfit: Callable[[Shape], str] = lambda shape: ""


def _unfit_for_tpu(shape: Shape) -> str:
    rows = tile_rows(shape.page_dtype)
    if shape.page % rows:
        return f"a page of {shape.page} tokens in {shape.page_dtype} is no multiple of {rows}"
    if shape.head_width % LANES:
        return f"a head of width {shape.head_width} is no multiple of {LANES}"
    entries = shape.rows * shape.table + tpu.longest_list(shape)
    if entries > SCALARS:
        return f"{shape.rows} rows of {shape.table} pages need {entries} entries of {SCALARS}; larger pages need fewer"
    return ""


BACKENDS: dict[str, Backend] = {
    "xla": Backend(xla.paged_attention),
    "tpu": Backend(tpu.paged_attention, devices="TPU", unfit=_unfit_for_tpu),
    "tpu_interpreted": Backend(functools.partial(tpu.paged_attention, interpret=True)),
    "reference": Backend(reference.paged_attention),
}
"""By the name that ``implementation`` gives. The interpreted one is for tests on machines without a TPU."""

AUTOMATIC = ("tpu", "xla")
"""What "auto" tries, in order: the first that runs on the device and takes the shape."""


def chosen(implementation: str, shape: Shape) -> str:
    """Name of the backend for a shape on the devices at hand; says once when "auto" passes one over for the shape.

    Raises:
        ValueError: the name is unknown, or names a backend that does not run here or cannot take the shape.
    """
    kind = device_kind()
    if implementation == "auto":
        for name in AUTOMATIC:
            backend = BACKENDS[name]
            if not kind.startswith(backend.devices):
                continue
            reason = backend.unfit(shape)
            if not reason:
                return name
            warnings.warn(f"paged attention: {name!r} is passed over: {reason}", stacklevel=2)
    if implementation not in BACKENDS:
        raise ValueError(f"implementation={implementation!r} is unknown; choose auto, {', '.join(BACKENDS)}")
    backend = BACKENDS[implementation]
    if not kind.startswith(backend.devices):
        raise ValueError(f"implementation={implementation!r} needs a {backend.devices}, not {kind!r}; choose auto")
    if reason := backend.unfit(shape):
        raise ValueError(f"implementation={implementation!r} cannot take this: {reason}; or choose auto")
    return implementation
