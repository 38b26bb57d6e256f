"""What a compiled program sends between its devices, read from its text."""

import collections
import dataclasses
import graphlib
import math
import re
from collections.abc import Iterable, Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|branch_computations)=(?:%?([\w.\-]+)|\{([^}]*)\})")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{(.*?)\}"
)
_CHAIN = re.compile(r'chain_id="(\d+)"')
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one run of a program.

    Attributes:
        count: how often they are started.
        sent: bytes that leave each device, if they go along a ring.
        beyond: share of a device in the bytes that leave its slice or host, if as many rings begin at each of its
            devices.
    """

    kind: str
    count: int
    sent: int
    beyond: int = 0


@dataclasses.dataclass(frozen=True)
class _Instruction:
    kind: str
    result: str
    line: str


def traffic(text: str, inner: int) -> list[Traffic]:
    """The collectives of a compiled program, those in a loop as often as it turns.

    Args:
        text: of the optimised module.
        inner: devices of one slice or host, which are numbered one after the other.
    """
    totals: dict[str, list[int]] = {}
    for instruction, times in _started(*_parse(text)):
        kind, size = instruction.kind.removesuffix("-start"), _size(instruction)
        group, neighbours = _group(instruction.line, inner)
        if group > 1:
            total, sent = totals.setdefault(kind, [0, 0, 0]), _sent(kind, size, group)
            total[0] += times
            total[1] += times * sent
            total[2] += times * (sent // neighbours if neighbours < group else 0)
    return [Traffic(kind, *total) for kind, total in sorted(totals.items())]


def _started(computations: Mapping[str, list[_Instruction]], entry: str) -> list[tuple[_Instruction, int]]:
    """Every collective, with how often it is started.

    The compiler for TPUs writes an asynchronous one several times under one ``chain_id``: in the fusion that starts it,
    in those that compute beside it, and in the one that awaits it.
    """
    found: dict[tuple[str, ...], tuple[_Instruction, int]] = {}
    for name, times in _times(computations, entry).items():
        for place, instruction in enumerate(computations[name]):
            if instruction.kind.removesuffix("-start") in KINDS:
                chain = _CHAIN.search(instruction.line)
                key = ("chain", chain[1]) if chain else (name, str(place))
                if times > found.get(key, (instruction, 0))[1]:
                    found[key] = instruction, times
    return list(found.values())


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line and not line[0].isspace():
            match = _COMPUTATION.match(line)
            current = computations.setdefault(match[1], []) if match else None
            if match and line.startswith("ENTRY"):
                entry = match[1]
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_Instruction(match[3], match[2], line))
    return computations, entry


def _times(computations: Mapping[str, list[_Instruction]], entry: str) -> dict[str, int]:
    """How often each computation that the entry reaches is run."""
    called = {name: [(one, _callees(one.line)) for one in body] for name, body in computations.items()}
    graph = {name: {callee for _, callees in body for callee in callees} for name, body in called.items()}
    times = dict.fromkeys(graphlib.TopologicalSorter(graph).static_order(), 0) | {entry: 1}
    for name in reversed(times):
        for instruction, callees in called.get(name, ()):
            turns = _trips(instruction, computations) if instruction.kind == "while" else 1
            for callee in callees:
                times[callee] += times[name] * turns
    return {name: number for name, number in times.items() if number and name in computations}


def _callees(line: str) -> list[str]:
    found = [name for one, several in _CALLED.findall(line) for name in (one, *several.split(","))]
    return [name.strip().removeprefix("%") for name in found if name.strip()]


def _trips(loop: _Instruction, computations: Mapping[str, list[_Instruction]]) -> int:
    """Turns of a loop; 1 where only the data decide."""
    if match := _TRIPS.search(loop.line):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.line)
    body = computations.get(condition[1], []) if condition else []
    limits = [int(m[1]) for one in body if one.kind == "constant" and (m := re.search(r"constant\((\d+)\)", one.line))]
    compares = [one for one in body if one.kind == "compare" and "ROOT" in one.line and "direction=LT" in one.line]
    return limits[0] if len(limits) == 1 and len(compares) == 1 else 1


def _size(instruction: _Instruction) -> int:
    """Bytes of the result on one device; one that is only started names its operands before its results."""
    arrays = [
        math.prod(int(part) for part in shape.split(",") if part) * _bytes(dtype)
        for dtype, shape in _ARRAY.findall(instruction.result)
    ]
    if instruction.kind in ("all-gather-start", "reduce-scatter-start", "all-to-all-start") and len(arrays) > 1:
        return sum(arrays[len(arrays) // 2 :])
    if instruction.kind == "collective-permute-start":
        return max(arrays, default=0)
    return sum(arrays)


def _bytes(dtype: str) -> float:
    bits = _BITS.search(dtype)
    return int(bits[0]) / 8 if bits else 1


def _group(line: str, inner: int) -> tuple[int, int]:
    """How many devices take part in one group, and how many of them are in one slice or host."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", line):
        found = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1])]
        return 2, 1 if any(a // inner != b // inner for a, b in found) else 2
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        groups = [list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        return max(map(len, groups)), _neighbours(groups, inner)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        groups = _iota(int(iota[1]), int(iota[2]), _integers(iota[3]), _integers(iota[4] or ""))
        return int(iota[2]), _neighbours(groups, inner)
    if mesh := _MESH_GROUPS.search(line):
        lengths, shape, order, names = mesh.groups()
        axes = {name: int(length) for name, length in re.findall(r"'(\w+)'=(\d+)", lengths)}
        along = [list(axes).index(name) for name in re.findall(r"'(\w+)'", names)]
        others = [axis for axis in range(len(axes)) if axis not in along]
        size, total = math.prod(list(axes.values())[axis] for axis in along), math.prod(axes.values())
        (devices,) = _iota(1, total, _integers(shape or str(total)), _integers(order or ""))
        groups = _iota(total // size, size, list(axes.values()), others + along)
        return size, _neighbours([[devices[place] for place in group] for group in groups], inner)
    return 1, 1


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _iota(groups: int, size: int, shape: list[int], order: list[int]) -> list[list[int]]:
    """Groups that are written as a count of all devices in ``shape``, transposed to ``order``."""
    order = order or list(range(len(shape)))
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    flat = [0]
    for axis in order:
        flat = [start + step * strides[axis] for start in flat for step in range(shape[axis])]
    return [flat[first * size : (first + 1) * size] for first in range(groups)]


def _neighbours(groups: Iterable[list[int]], inner: int) -> int:
    """The fewest members that a group has in a slice or host that it touches."""
    return min(min(collections.Counter(device // inner for device in group).values()) for group in groups)


def _sent(kind: str, size: int, group: int) -> int:
    """Bytes that leave a device, along a ring: of the result's ``size`` for all but reduce-scatter, whose operand is
    ``group`` times as large."""
    share = (group - 1) / group
    match kind:
        case "all-reduce":
            return int(2 * size * share)
        case "reduce-scatter":
            return int(size * (group - 1))
        case "collective-permute":
            return int(size)
    return int(size * share)
