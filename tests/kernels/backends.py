"""Which backends the case tables run on: those of the kernels' own tables, so that a new row is tested."""

from collections.abc import Mapping

from jaxrl_kernels.choice import Backend, device_kind


def anywhere(table: Mapping[str, Backend]) -> list[str]:
    """Names of those that run on any device, but the reference, which they are compared with."""
    return [name for name, backend in table.items() if backend.devices == ("",) and name != "reference"]


def of_these_devices(table: Mapping[str, Backend]) -> list[str]:
    """Names of those that run on devices of some kind, which are at hand."""
    kind = device_kind()
    return [name for name, backend in table.items() if backend.devices != ("",) and kind.startswith(backend.devices)]
