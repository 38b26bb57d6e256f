"""Arrays on their way to devices that hold nothing of them: cast where they rest, sent in blocks, put together there.

``jax.device_put`` takes such an array through the host unless its pieces are the same on both sides. Of several
processes each sends to its own devices; where they lack parts of the array, they gather them first, a slab at a time.
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
class _Block:
    """A part of the array that one device sends, of what it holds, to another, named by its place among those that
    receive."""

    source: jax.Shard
    held: Box
    target: int
    box: Box


def carried(array: jax.Array, dtype: jnp.dtype, sharding: NamedSharding, chunk_bytes: int = CHUNK_BYTES) -> jax.Array:
    """A copy of ``array`` in another type, on other devices.

    Beyond the array and the copy, all sending devices of a process together and all receiving ones together hold at
    most about ``chunk_bytes`` at a time; where processes must gather an array that is split along every axis, each of
    the sending ones holds it whole.

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
    for part, first in _reachable(array, dtype, chunk_bytes):
        held: dict[Box, list[jax.Shard]] = {}
        for shard in part.addressable_shards:
            held.setdefault(_moved(_box(shard.index, part.shape), first), []).append(shard)
        for block in _blocks(wanted, held, chunk_bytes // dtype.itemsize // len(wanted)):
            target, lengths = block.target, _lengths(block.box)
            start = _offsets(block.box, block.held)
            sent = jax.device_put(_cut(_plain(block.source), start, lengths=lengths, dtype=dtype), devices[target])
            pieces[target] = _put(pieces[target], sent, _offsets(block.box, wanted[target]))
            written[target] += sent.size
            under_way += sent.nbytes
            if under_way >= chunk_bytes:
                jax.block_until_ready(pieces)
                under_way = 0
        if part is not array:
            jax.block_until_ready(pieces)  # and the slab is free again
    for device, piece, count in zip(devices, pieces, written, strict=True):
        if count != piece.size:
            raise ValueError(f"{device} is to get {piece.size} numbers, of which this process holds {count}")
    return jax.make_array_from_single_device_arrays(array.shape, sharding, jax.block_until_ready(pieces))


def _reachable(array: jax.Array, dtype: jnp.dtype, chunk_bytes: int) -> Iterator[tuple[jax.Array, tuple[int, ...]]]:
    """Arrays that are ``array`` together, of which every process holds all it needs, and where each begins in it: the
    array itself, or slabs that are gathered on all of its devices."""
    nowhere = (0,) * array.ndim
    if _whole_in_every_process(array):
        yield array, nowhere
        return
    local = array.sharding.shard_shape(array.shape)
    unsplit = [axis for axis in range(array.ndim) if local[axis] == array.shape[axis]]
    axis = max(unsplit, key=array.shape.__getitem__, default=0)
    gathered_bytes = array.size * dtype.itemsize * len(array.addressable_shards)
    slabs = 2 * gathered_bytes // chunk_bytes + 1 if unsplit else 1  # two are there when one follows another
    length = -(-array.shape[axis] // slabs)
    everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
    for first in range(0, array.shape[axis], length):
        size = min(length, array.shape[axis] - first)
        gather = jax.jit(_slab, static_argnames=("axis", "length", "dtype"), out_shardings=everywhere)
        slab = gather(array, first, axis=axis, length=size, dtype=dtype)
        yield slab, (*nowhere[:axis], first, *nowhere[axis + 1 :])


def _whole_in_every_process(array: jax.Array) -> bool:
    held: dict[int, set[Box]] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        held.setdefault(device.process_index, set()).add(_box(index, array.shape))
    return all(sum(math.prod(_lengths(box)) for box in boxes) == array.size for boxes in held.values())


def _slab(array: jax.Array, first: jax.Array, *, axis: int, length: int, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, first, length, axis).astype(dtype)


def _blocks(wanted: list[Box], held: dict[Box, list[jax.Shard]], size: int) -> Iterator[_Block]:
    """What every device is to get, in blocks of about ``size`` numbers, all devices in turn.

    Of shards that hold the same, each sends to other devices.
    """
    queues = []
    for target, box in enumerate(wanted):
        parts = [
            (shards[target % len(shards)], have, common)
            for have, shards in held.items()
            if (common := _overlap(have, box)) is not None
        ]
        cuts = [(source, have, cut) for source, have, common in parts for cut in _cuts(common, max(size, 1))]
        queues.append([_Block(source, have, target, cut) for source, have, cut in cuts])
    for turn in itertools.zip_longest(*queues):
        yield from (block for block in turn if block is not None)


def _cuts(box: Box, size: int) -> list[Box]:
    """The box in slabs of about ``size`` numbers along its longest axis."""
    if not box:
        return [box]
    lengths = _lengths(box)
    axis = max(range(len(box)), key=lengths.__getitem__)
    step = max(1, size * lengths[axis] // max(math.prod(lengths), 1))
    first, last = box[axis]
    return [(*box[:axis], (at, min(at + step, last)), *box[axis + 1 :]) for at in range(first, last, step)]


def _plain(shard: jax.Shard) -> jax.Array:
    """What the device holds, as an array that knows of no mesh: on a mesh of one device a shard is the array itself."""
    alone = SingleDeviceSharding(shard.device)
    return jax.make_array_from_single_device_arrays(shard.data.shape, alone, [shard.data])


def _overlap(one: Box, other: Box) -> Box | None:
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(first < last for first, last in common) else None


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(part.indices(length)[:2] for part, length in zip(index, shape, strict=True))


def _moved(box: Box, offsets: tuple[int, ...]) -> Box:
    return tuple((first + offset, last + offset) for (first, last), offset in zip(box, offsets, strict=True))


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
