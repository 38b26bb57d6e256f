"""Which backends the case tables run on: those of the kernels' own tables, so that a new row is tested."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from jaxrl_kernels.choice import Backend, device_kind
from jaxrl_kernels.interval_attention.backends import BACKENDS, Shape
from jaxrl_kernels.interval_attention.cases import Case


def anywhere(table: Mapping[str, Backend]) -> list[str]:
    """Names of those that run on any device, but the reference, which they are compared with."""
    return [name for name, backend in table.items() if backend.devices == ("",) and name != "reference"]


def of_these_devices(table: Mapping[str, Backend]) -> list[str]:
    """Names of those that run on devices of some kind, which are at hand."""
    kind = device_kind()
    return [name for name, backend in table.items() if backend.devices != ("",) and kind.startswith(backend.devices)]


def taken(name: str, cases: Iterable[Case]) -> Iterator[Case]:
    """The cases that a backend of interval attention takes, in bfloat16 where it takes them only so."""
    for case in cases:
        forms = case, dataclasses.replace(case, dtype="bfloat16")
        yield from [form for form in forms if not BACKENDS[name].unfit(_shape(form))][:1]


def _shape(case: Case) -> Shape:
    groups = case.query_heads // case.kv_heads
    queries = case.tokens - case.first
    return Shape(case.batch, queries, case.tokens, groups, case.head_width, case.dtype, soft_cap=case.soft_cap)
