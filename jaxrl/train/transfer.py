"""Arrays on their way to devices that hold nothing of them: cast where they rest, sent in blocks, put together there.

``jax.device_put`` takes such an array through the host unless its pieces are the same on both sides. Of several
processes each sends to its own devices; where they lack parts of the array, they gather them first, a piece of every
shard at a time.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

CHUNK_BYTES = 256 << 20
"""What may be under way at once, of all devices together."""

Box = tuple[tuple[int, int], ...]
"""First and last + 1 of every axis: a part of an array."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """Where a device holds a part of the array: in data of its own, which knows of no mesh, from ``start`` on."""

    data: jax.Array
    start: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Block:
    """A part of the array that one device sends, of what it holds, to another, named by its place among those that
    receive."""

    source: _Part
    held: Box
    target: int
    box: Box


def carried(array: jax.Array, dtype: jnp.dtype, sharding: NamedSharding, chunk_bytes: int = CHUNK_BYTES) -> jax.Array:
    """A copy of ``array`` in another type, on other devices.

    Beyond the array and the copy, all receiving devices of a process together hold at most about ``chunk_bytes`` at a
    time, and all sending ones as much; twice that where they must gather what their process lacks.

    Args:
        array: of several processes all call this together.
        sharding: where the copy rests.

    Raises:
        ValueError: this process does not hold all that a device is to get.
    """
    places = sharding.addressable_devices_indices_map(array.shape)
    devices, wanted = list(places), [_box(index, array.shape) for index in places.values()]
    pieces = [jnp.zeros(_lengths(box), dtype, device=device) for device, box in zip(devices, wanted, strict=True)]
    written, under_way = [0] * len(pieces), 0
    alone = _whole_in_every_process(array)
    for held in (_held(array),) if alone else _gathered(array, dtype, chunk_bytes):
        for block in _blocks(wanted, held, chunk_bytes // dtype.itemsize // len(wanted)):
            target, source, lengths = block.target, block.source, _lengths(block.box)
            start = tuple(map(sum, zip(source.start, _offsets(block.box, block.held), strict=True)))
            sent = jax.device_put(_cut(source.data, start, lengths=lengths, dtype=dtype), devices[target])
            pieces[target] = _put(pieces[target], sent, _offsets(block.box, wanted[target]))
            written[target] += sent.size
            under_way += sent.nbytes
            if under_way >= chunk_bytes:
                jax.block_until_ready(pieces)
                under_way = 0
        if not alone:
            jax.block_until_ready(pieces)  # and what was gathered is free again
    for device, piece, count in zip(devices, pieces, written, strict=True):
        if count != piece.size:
            raise ValueError(f"{device} is to get {piece.size} numbers, of which this process holds {count}")
    return jax.make_array_from_single_device_arrays(array.shape, sharding, jax.block_until_ready(pieces))


def _held(array: jax.Array) -> dict[Box, list[_Part]]:
    """What devices of this process hold of it: by which part that is, all that have it."""
    held: dict[Box, list[_Part]] = {}
    for shard in array.addressable_shards:
        part = _Part(_plain(shard), (0,) * array.ndim)
        held.setdefault(_box(shard.index, array.shape), []).append(part)
    return held


def _gathered(array: jax.Array, dtype: jnp.dtype, chunk_bytes: int) -> Iterator[dict[Box, list[_Part]]]:
    """The same, of all processes, a box of every shard at a time; each device of a process holds all those boxes."""
    shard = array.sharding.shard_shape(array.shape)
    counts = [whole // length for whole, length in zip(array.shape, shard, strict=True)]
    # Two are there when one follows another.
    size = chunk_bytes // (2 * math.prod(counts) * len(array.addressable_shards) * dtype.itemsize)
    steps = _steps(shard, counts, size)
    for first in itertools.product(*map(range, itertools.repeat(0), shard, steps)):
        lengths = tuple(map(min, steps, (length - at for length, at in zip(shard, first, strict=True))))
        joined = _gather(array, first, lengths=lengths, dtype=dtype, sharding=array.sharding)
        everywhere = [_plain(whole) for whole in joined.addressable_shards]
        axes = itertools.starmap(_along, zip(shard, counts, first, lengths, strict=True))
        yield {
            tuple(span for span, _ in part): [_Part(whole, tuple(start for _, start in part)) for whole in everywhere]
            for part in itertools.product(*axes)
        }


def _along(length: int, count: int, first: int, size: int) -> list[tuple[tuple[int, int], int]]:
    """What boxes that were joined along an axis are of it, and where there each begins in what was joined; shards are
    ``length`` long. What is not cut is one."""
    if size == length:
        return [((0, count * length), 0)]
    places = [number * length + first for number in range(count)]
    return [((at, at + size), number * size) for number, at in enumerate(places)]


def _steps(shard: tuple[int, ...], counts: list[int], size: int) -> list[int]:
    """Lengths of a box of at most ``size`` numbers of a shard. It is cut so that those of all shards are few parts of
    the array: along axes that do not split it first, and along those that split it most last."""
    steps = list(shard)
    for axis in sorted(range(len(shard)), key=lambda axis: (counts[axis], -shard[axis])):
        if (whole := math.prod(steps)) > size:
            steps[axis] = max(1, steps[axis] * size // whole)
    return steps


@functools.partial(jax.jit, static_argnames=("lengths", "dtype", "sharding"))
def _gather(
    array: jax.Array, first: Any, *, lengths: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding
) -> jax.Array:
    """A box of every shard, the same in each, joined along the axes that split the array, on all of its devices."""

    def gathered(shard: jax.Array, first: Any) -> jax.Array:
        piece = jax.lax.dynamic_slice(shard, first, lengths).astype(dtype)
        for axis, names in enumerate(sharding.spec):
            piece = piece if names is None else jax.lax.all_gather(piece, names, axis=axis, tiled=True)
        return piece

    specs = sharding.spec, PartitionSpec()
    joined = jax.shard_map(gathered, mesh=sharding.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return joined(array, first)


def _whole_in_every_process(array: jax.Array) -> bool:
    held: dict[int, set[Box]] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        held.setdefault(device.process_index, set()).add(_box(index, array.shape))
    return all(sum(math.prod(_lengths(box)) for box in boxes) == array.size for boxes in held.values())


def _blocks(wanted: list[Box], held: dict[Box, list[_Part]], size: int) -> Iterator[_Block]:
    """What every device is to get, in blocks of at most ``size`` numbers, all devices in turn.

    Of devices that hold the same, each sends to other devices.
    """
    queues = []
    for target, box in enumerate(wanted):
        parts = [
            (sources[target % len(sources)], have, common)
            for have, sources in held.items()
            if (common := _overlap(have, box)) is not None
        ]
        cuts = [(source, have, cut) for source, have, common in parts for cut in _cuts(common, max(size, 1))]
        queues.append([_Block(source, have, target, cut) for source, have, cut in cuts])
    for turn in itertools.zip_longest(*queues):
        yield from (block for block in turn if block is not None)


def _cuts(box: Box, size: int) -> list[Box]:
    """The box in parts of at most ``size`` numbers: slabs along its longest axis, which may have to be cut again."""
    lengths = _lengths(box)
    whole = math.prod(lengths)
    if whole <= size:
        return [box]
    axis = max(range(len(box)), key=lengths.__getitem__)
    step = max(1, size * lengths[axis] // whole)
    first, last = box[axis]
    slabs = [(*box[:axis], (at, min(at + step, last)), *box[axis + 1 :]) for at in range(first, last, step)]
    return [part for slab in slabs for part in _cuts(slab, size)]


def _plain(shard: jax.Shard) -> jax.Array:
    """What the device holds, as an array that knows of no mesh: on a mesh of one device a shard is the array itself."""
    alone = SingleDeviceSharding(shard.device)
    return jax.make_array_from_single_device_arrays(shard.data.shape, alone, [shard.data])


def _overlap(one: Box, other: Box) -> Box | None:
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(first < last for first, last in common) else None


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(part.indices(length)[:2] for part, length in zip(index, shape, strict=True))


def _lengths(box: Box) -> tuple[int, ...]:
    return tuple(last - first for first, last in box)


def _offsets(box: Box, within: Box) -> tuple[int, ...]:
    return tuple(first - start for (first, _), (start, _) in zip(box, within, strict=True))


@functools.partial(jax.jit, static_argnames=("lengths", "dtype"))
def _cut(data: jax.Array, offsets: Any, *, lengths: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dynamic_slice(data, offsets, lengths).astype(dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _put(piece: jax.Array, block: jax.Array, offsets: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice(piece, block, offsets)
