"""Which row of a kernel's table of backends runs where."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

TPUS = ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")
"""Kinds, as jax says them, that kernels for TPUs are compiled for: v5e, v5p, v6e and 7x. Older ones have less room."""


class Backend(Protocol):
    """What a choice needs of a row.

    Attributes:
        devices: beginnings of the kinds of device, as jax says them, that it runs on.
        unfit: why it cannot take a shape, empty if it can.
        blocks: in which blocks it computes a shape, empty where nothing but the backend decides that.
        automatic: "auto" may take it.
        plain: it is plain JAX, by which others are judged.
    """

    @property
    def devices(self) -> tuple[str, ...]: ...

    @property
    def unfit(self) -> Callable[[Any], str]: ...

    @property
    def blocks(self) -> Callable[[Any], str]: ...

    @property
    def automatic(self) -> bool: ...

    @property
    def plain(self) -> bool: ...


def device_kind() -> str:
    """Kind of the devices that what is traced now will run on, as jax says it: those of the mesh, if one is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def chosen(table: Mapping[str, Backend], implementation: str, shapes: Sequence[Any], what: str) -> str:
    """Name of the backend for shapes on the devices at hand; says once when "auto" passes one over for a shape.

    Args:
        table: backends by name. "auto" takes the first one that it may take, that runs on the device and that takes
            every shape.
        implementation: "auto", or a name in the table.
        shapes: what is computed, by one backend all of it.
        what: the table computes, for messages.

    Raises:
        ValueError: the name is unknown, or names a backend that does not run here or cannot take a shape.
    """
    if implementation == "auto":
        for name, backend in table.items():
            if not backend.automatic or not device_kind().startswith(backend.devices):
                continue
            if not (reason := _unfit(backend, shapes)):
                return name
            say_once(f"{what}: {name!r} is passed over: {reason}")
    if implementation not in table:
        raise ValueError(f"implementation={implementation!r} is unknown; choose auto, {', '.join(table)}")
    if reason := refusal(table[implementation], shapes):
        raise ValueError(f"implementation={implementation!r} {reason}; choose auto")
    return implementation


def refusal(backend: Backend, shapes: Sequence[Any]) -> str:
    """Why a backend cannot compute these shapes on the devices at hand; empty if it can."""
    kind = device_kind()
    if not kind.startswith(backend.devices):
        return f"needs a {' or '.join(backend.devices)}, not {kind!r}"
    reason = _unfit(backend, shapes)
    return f"cannot take this: {reason}" if reason else ""


@functools.cache
def say_once(message: str) -> None:
    """Warn, the first time that a process asks for it. Python's own memory of what was said is cleared wherever a
    library catches warnings."""
    warnings.warn(message, stacklevel=2)


def _unfit(backend: Backend, shapes: Sequence[Any]) -> str:
    return next(filter(None, map(backend.unfit, shapes)), "")
