"""What a step computes and sends, and how long that takes at the rates of the data sheets."""

import dataclasses
import math

from jaxrl.check.run import Result
from jaxrl.check.targets import CHIPS
from jaxrl.mesh import replica_lengths
from jaxrl.model.kv_pages import token_bytes
from jaxrl.rollout.scheduler import pages_of


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a step on every device; seconds are those of the slowest of four limits, which no device beats.

    Attributes:
        flops: matrix products of one device.
        read: bytes a device reads from its memory, at least.
        sent: bytes a device sends to its neighbours, and
        beyond: its share of what leaves the slice or host.
    """

    name: str
    flops: float
    read: float
    sent: float
    beyond: float
    seconds: float


def micro_batches(result: Result) -> int:
    """Micro-batches of a step at most: every group stays, and every trajectory fills a row."""
    train = result.config.train
    return train.passes * math.ceil(train.problems * result.config.algorithm.keep / train.rows)


def phases(result: Result) -> list[Phase]:
    """Update and decoding of a step whose trajectories all have their longest length.

    Empty for a target without data sheet.
    """
    if not result.target.chip:
        return []
    return [_update(result), _decoding(result)]


def _update(result: Result) -> Phase:
    more, apply = result.compiled["more"], result.compiled["apply"]
    number = micro_batches(result)
    updates = result.config.train.passes * result.config.train.updates_per_step
    sent, beyond = (
        number * sum(one[field] for one in more.traffic) + updates * sum(one[field] for one in apply.traffic)
        for field in ("sent", "beyond")
    )
    read = number * (more.arguments + more.temporary) + updates * (apply.arguments + apply.temporary)
    return _phase(
        "update",
        number * more.flops / (result.devices - result.config.mesh.rollout_devices),
        read,
        sent,
        beyond,
        result,
    )


def _decoding(result: Result) -> Phase:
    """Every trajectory token by token, with all slots full: a replica reads its weights, and the keys and values of
    every slot, on average of half the longest sequence, once a token."""
    config, model = result.config, result.config.model
    tensor = config.mesh.rollout_tensor or config.mesh.tensor
    replicas = (config.mesh.rollout_devices or result.devices) // tensor
    engine = config.engine
    held = pages_of(engine)[1] * engine.page_size
    sequence = engine.max_prompt_tokens + engine.max_response_tokens
    slots = min(engine.slots, held // (sequence // 2))
    tokens = config.train.problems * config.train.samples * engine.max_response_tokens
    steps = tokens / (replicas * slots)
    split = replica_lengths(tensor, model.kv_heads)["tensor"]
    read = steps * (result.resident.engine + slots * sequence // 2 * token_bytes(model, engine.kv_dtype) / split)
    decode = result.compiled["decode"]
    sent, beyond = (steps * sum(one[field] for one in decode.traffic) for field in ("sent", "beyond"))
    return _phase("decoding", steps * decode.flops / tensor, read, sent, beyond, result)


def _phase(name: str, flops: float, read: float, sent: float, beyond: float, result: Result) -> Phase:
    chip = CHIPS[result.target.chip]
    seconds = max(flops / chip.flops, read / chip.memory_rate, sent / chip.link_rate, beyond / chip.outer_rate)
    return Phase(name, flops, read, sent, beyond, seconds)
