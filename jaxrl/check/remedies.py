"""Ways to make a run fit that does not, the cheapest first."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from jaxrl.check import estimate, targets
from jaxrl.config import Config, ConfigError
from jaxrl.rollout.scheduler import pages_of

MOST_GROWTH = 32
"""Times as much memory in all as was asked about, beyond which no remedy is looked for."""

OTHER_KIND = 5.0
"""Price of another kind of devices: who names one has it, or wants it."""

ROOM = 0.97
"""Share of the memory that an estimate may fill, so that few remedies fail when they are compiled."""

LEAST_SEQUENCES = 4
"""Longest sequences for which a replica has pages at least."""

EXPERT_CHUNK = 4096
"""Tokens that a device's experts are proposed to compute at once."""

Settings = dict[str, Any]
"""Values by key, as ``--set`` takes them."""


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change of the configuration, or of the target, that may make a run fit.

    Attributes:
        price: of what it costs, to rank by: a doubling of the memory of all devices is 10.
        words: what is given up.
    """

    settings: Settings
    target: targets.Target
    price: float
    words: tuple[str, ...]

    def options(self, asked: targets.Target) -> str:
        """As options of the command line that ``asked`` for another target, or for the same."""
        target = [] if self.target == asked else [f"--target '{self.target.name}'"]
        return " ".join([*target, *(f"--set {key}={value}" for key, value in self.settings.items())])


@dataclasses.dataclass(frozen=True)
class _Step:
    """One value of one knob."""

    settings: Settings = dataclasses.field(default_factory=dict)
    price: float = 0.0
    words: str = ""


def changed(config: Config, settings: Settings) -> Config:
    """``config`` with other values."""
    sections = {type(getattr(config, field.name)).__name__: field.name for field in dataclasses.fields(config)}
    for key, value in settings.items():
        section, field = key.split(".")
        name = sections[section]
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **{field: value})})
    return config


@dataclasses.dataclass(frozen=True)
class _Size:
    """A target, with the bytes of one device and what it costs to take it."""

    target: targets.Target
    devices: int
    memory: int
    price: float = 0.0
    words: tuple[str, ...] = ()


def candidates(
    config: Config, target: targets.Target, devices: int, memory: int, needs: Callable[[Config, int], int]
) -> Iterator[Remedy]:
    """Remedies that should be enough, the cheapest first.

    Args:
        devices: of ``target``.
        memory: bytes of one device.
        needs: bytes of one device that a configuration needs on so many devices, as estimated; raises ConfigError where
            it cannot run.
    """
    plans = itertools.product(_sizes(target, devices, memory), itertools.product(*_knobs(config)))
    for price, size, steps in sorted(map(_priced, plans), key=lambda plan: (plan[0], sum(map(bool, plan[2])))):
        if price:
            settings: Settings = {key: value for step in steps for key, value in step.settings.items()}
            try:
                settings |= _rows(config, settings, size.devices)
                asked = changed(config, settings)
                alone = size.target.of_process % (asked.mesh.rollout_tensor or asked.mesh.tensor) == 0
                enough = alone and needs(asked, size.devices) <= ROOM * size.memory
            except ConfigError:
                continue
            if enough:  # and a replica of the engine lies in one process
                words = tuple(step.words for step in steps if step.words)
                yield Remedy(settings, size.target, price, size.words + words)


def _priced(plan: tuple[_Size, tuple[_Step, ...]]) -> tuple[float, _Size, tuple[_Step, ...]]:
    size, steps = plan
    return size.price + sum(step.price for step in steps), size, steps


def says_little(remedy: Remedy, other: Remedy, config: Config, asked: targets.Target) -> bool:
    """Whether a remedy is of no interest beside a cheaper one: it is on the same other kind of devices, or goes further
    in all that the other changes.

    Args:
        config: to which both are changes.
        asked: the target that it does not fit on.
    """
    if remedy.target.chip != other.target.chip:
        return False
    if remedy.target.chip != asked.chip:
        return True
    if remedy.target.devices < other.target.devices:
        return False
    return remedy.settings.keys() == other.settings.keys() or all(
        key in remedy.settings and _as_far(remedy.settings[key], value, _value(config, key))
        for key, value in other.settings.items()
    )


def _as_far(value: Any, other: Any, start: Any) -> bool:
    if isinstance(other, int) and not isinstance(other, bool):
        return min(start, value) <= other <= max(start, value)
    return value == other


def _value(config: Config, key: str) -> Any:
    section, field = key.split(".")
    (found,) = (one for one in vars(config).values() if type(one).__name__ == section)
    return getattr(found, field)


def _sizes(target: targets.Target, devices: int, memory: int) -> Iterator[_Size]:
    """The target, larger ones of its kind, and ones of other kinds whose devices have more memory."""
    yield _Size(target, devices, memory)
    for kind in [target, *target.other_kinds()] if target.chip else []:
        each = memory * kind.memory() // target.memory()
        words, extra = ("more devices", 0.0) if kind == target else ("other devices, with more memory", OTHER_KIND)
        for size in kind.and_larger():
            growth = size.devices * each / (devices * memory)
            if growth > MOST_GROWTH:
                break
            if growth > 1 and (kind == target or each > memory):
                yield _Size(size, size.devices, each, 10 * math.log2(growth) + extra, (f"{size.name}: {words}",))


def _rows(config: Config, settings: Settings, devices: int) -> Settings:
    """As many rows as there are pieces of the batch, where another mesh or fewer rows are asked for."""
    asked = changed(config, {key: value for key, value in settings.items() if key != "TrainConfig.rows"})
    pieces = estimate.row_pieces(asked, devices)
    rows = pieces if "TrainConfig.rows" in settings or config.train.rows % pieces else config.train.rows
    wanted = {"TrainConfig.rows": rows} if rows != config.train.rows else {}
    if config.sft.demonstrations and config.sft.rows % pieces:
        wanted["SftConfig.rows"] = pieces
    return wanted


def _knobs(config: Config) -> list[list[_Step]]:
    """Every knob with its values, the present one first."""
    ways = (_fewer_rows, _fewer_pages, _wider_replicas, _recomputed, _chunks, _context, _tensor, _offload, _adapters)
    return [[_Step(), *way(config)] for way in ways]


def _fewer_rows(config: Config) -> Iterator[_Step]:
    if config.train.rows > 1:
        yield _Step({"TrainConfig.rows": 1}, 0.5, "more and smaller micro-batches")


def _fewer_pages(config: Config) -> Iterator[_Step]:
    width, pages = pages_of(config.engine)
    least = LEAST_SEQUENCES * (width + 1)
    for halvings in range(1, 7):
        if pages >> halvings >= least:
            words = f"1/{2**halvings} of the KV pages: as many fewer sequences in flight"
            yield _Step({"EngineConfig.pages": pages >> halvings}, 1.0 * halvings, words)


def _wider_replicas(config: Config) -> Iterator[_Step]:
    now = config.mesh.rollout_tensor or config.mesh.tensor
    for doublings in range(1, 5):
        wide = now << doublings
        heads = config.model.kv_heads
        if config.model.query_heads % wide == 0 and (heads % wide == 0 or wide % heads == 0):
            words = f"a replica of the engine on {wide} devices: each layer waits for their sums"
            yield _Step({"MeshConfig.rollout_tensor": wide}, 1.0 * doublings, words)


def _recomputed(config: Config) -> Iterator[_Step]:
    if config.model.remat != "full":
        yield _Step({"ModelConfig.remat": "full"}, 2.0, "a third more products: layers are computed again")


def _chunks(config: Config) -> Iterator[_Step]:
    if config.model.experts and not config.model.expert_chunk:
        words = f"experts compute {EXPERT_CHUNK} tokens at a time, and once more in the backward pass"
        yield _Step({"ModelConfig.expert_chunk": EXPERT_CHUNK}, 1.0, words)


def _context(config: Config) -> Iterator[_Step]:
    for doublings in range(1, 4):
        wide = config.mesh.context << doublings
        if config.mesh.fsdp == -1 and config.train.row_tokens % (wide * config.mesh.tensor) == 0:
            words = f"rows split over {wide} devices: keys and values travel in each layer"
            yield _Step({"MeshConfig.context": wide}, 2.0 + doublings, words)


def _tensor(config: Config) -> Iterator[_Step]:
    model = config.model
    for doublings in range(1, 4):
        wide = config.mesh.tensor << doublings
        if config.mesh.fsdp == -1 and model.kv_heads % wide == model.ffn_width % wide == model.vocab_size % wide == 0:
            words = f"layers split over {wide} devices: activations travel twice in each"
            yield _Step({"MeshConfig.tensor": wide}, 3.0 + doublings, words)


def _offload(config: Config) -> Iterator[_Step]:
    if not config.optimizer.offload:
        words = "the moments go to the host and back each update"
        yield _Step({"OptimizerConfig.offload": True}, 4.0, words)


def _adapters(config: Config) -> Iterator[_Step]:
    settings: Settings = {} if config.lora.rank else {"LoraConfig.rank": 16, "ModelConfig.param_dtype": "bfloat16"}
    trained, price = ("", 0.0) if config.lora.rank else ("adapters of rank 16 are trained, on ", 8.0)
    if settings:
        yield _Step(settings, price, trained + "weights frozen in bfloat16")
    if config.lora.base == "none":
        for base, bits, more in (("int8", 8, 1.0), ("nf4", 4, 2.0)):
            yield _Step(settings | {"LoraConfig.base": base}, price + more, f"{trained}weights frozen in {bits} bits")
