"""Arrays on their way to devices that hold nothing of them: cast where they rest, sent in blocks, put together there.

``jax.device_put`` takes such an array through the host unless its pieces are the same on both sides.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding

CHUNK_BYTES = 256 << 20
"""What may be under way at once, of all devices together."""

Box = tuple[tuple[int, int], ...]
"""First and last + 1 of every axis: a part of an array."""


@dataclasses.dataclass(frozen=True)
class _Block:
    """A part of the array that one device sends to another, named by its place among those that receive."""

    source: jax.Shard
    target: int
    box: Box


def carried(array: jax.Array, dtype: jnp.dtype, sharding: NamedSharding, chunk_bytes: int = CHUNK_BYTES) -> jax.Array:
    """A copy of ``array`` in another type, on other devices.

    Beyond the array and the copy, all sending devices together and all receiving ones together hold at most about
    ``chunk_bytes`` at a time.

    Args:
        sharding: where the copy rests; its devices are reached from this process.

    Raises:
        ValueError: this process does not hold all that a device is to get.
    """
    places = sharding.addressable_devices_indices_map(array.shape)
    devices, wanted = list(places), [_box(index, array.shape) for index in places.values()]
    held: dict[Box, list[jax.Shard]] = {}
    for shard in array.addressable_shards:
        held.setdefault(_box(shard.index, array.shape), []).append(shard)
    pieces = [jnp.zeros(_lengths(box), dtype, device=device) for device, box in zip(devices, wanted, strict=True)]
    written, under_way = [0] * len(pieces), 0
    for block in _blocks(wanted, held, chunk_bytes // dtype.itemsize // len(wanted)):
        target, lengths = block.target, _lengths(block.box)
        start = _offsets(block.box, _box(block.source.index, array.shape))
        sent = jax.device_put(_cut(_plain(block.source), start, lengths=lengths, dtype=dtype), devices[target])
        pieces[target] = _put(pieces[target], sent, _offsets(block.box, wanted[target]))
        written[target] += sent.size
        under_way += sent.nbytes
        if under_way >= chunk_bytes:
            jax.block_until_ready(pieces)
            under_way = 0
    for device, piece, count in zip(devices, pieces, written, strict=True):
        if count != piece.size:
            raise ValueError(f"{device} is to get {piece.size} numbers, of which this process holds {count}")
    return jax.make_array_from_single_device_arrays(array.shape, sharding, jax.block_until_ready(pieces))


def _blocks(wanted: list[Box], held: dict[Box, list[jax.Shard]], size: int) -> Iterator[_Block]:
    """What every device is to get, in blocks of about ``size`` numbers, all devices in turn.

    Of shards that hold the same, each sends to other devices.
    """
    queues = []
    for target, box in enumerate(wanted):
        parts = [
            (shards[target % len(shards)], common)
            for have, shards in held.items()
            if (common := _overlap(have, box)) is not None
        ]
        queues.append([_Block(source, target, cut) for source, common in parts for cut in _cuts(common, max(size, 1))])
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
