"""Ways to make a run fit that does not, the cheapest first."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxrl.check import estimate, targets
from jaxrl.config import Config, ConfigError
from jaxrl.rollout.scheduler import pages_of

MOST_DEVICES = 32
"""Times as many devices as were asked about, beyond which no remedy is looked for."""

ROOM = 0.97
"""Share of the memory that an estimate may fill, so that few remedies fail when they are compiled."""

LEAST_SEQUENCES = 4
"""Longest sequences for which a replica has pages at least."""

Settings = dict[str, Any]
"""Values by key, as ``--set`` takes them."""


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change of the configuration, or of the target, that may make a run fit.

    Attributes:
        price: of what it costs, to rank by: a doubling of devices is 10.
        words: what is given up.
    """

    settings: Settings
    target: targets.Target
    price: float
    words: tuple[str, ...]


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
    found: list[tuple[float, Settings, targets.Target, tuple[str, ...]]] = []
    for larger, growth in _sizes(target, devices):
        for steps in itertools.product(*_knobs(config)):
            settings: Settings = {key: value for step in steps for key, value in step.settings.items()}
            if not settings and growth == 1:
                continue
            many = devices * growth
            try:
                settings |= _rows(config, settings, many)
                asked = changed(config, settings)
                if larger.of_process % (asked.mesh.rollout_tensor or asked.mesh.tensor):
                    continue  # a replica of the engine lies in one process
                if needs(asked, many) > ROOM * memory:
                    continue
            except ConfigError:
                continue
            price = sum(step.price for step in steps) + 10 * (growth.bit_length() - 1)
            words = tuple(step.words for step in steps if step.words)
            found.append((price, settings, larger, ((f"{larger.name}: more devices",) if growth > 1 else ()) + words))
    for price, settings, larger, words in sorted(found, key=lambda entry: (entry[0], len(entry[1]))):
        yield Remedy(settings, larger, price, words)


def goes_further(remedy: Remedy, other: Remedy, config: Config) -> bool:
    """Whether a remedy changes all that another changes, each at least as far from ``config``."""
    if remedy.target.devices < other.target.devices:
        return False
    return all(
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


def _sizes(target: targets.Target, devices: int) -> Iterable[tuple[targets.Target, int]]:
    """The target and larger ones of its kind, with how many times as many devices."""
    yield target, 1
    larger = target.larger()
    while larger is not None and larger.devices <= MOST_DEVICES * devices:
        if larger.devices % devices == 0:
            yield larger, larger.devices // devices
        larger = larger.larger()


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
    same = _Step()
    return [
        [same, _Step({"TrainConfig.rows": 1}, 0.5, "more and smaller micro-batches")],
        [same, *_fewer_pages(config)],
        [same, *_wider_replicas(config)],
        [same]
        if config.model.remat == "full"
        else [same, _Step({"ModelConfig.remat": "full"}, 2.0, "a third more products: layers are computed again")],
        [same, *_context(config)],
        [same, *_tensor(config)],
        [same]
        if config.optimizer.offload
        else [
            same,
            _Step({"OptimizerConfig.offload": True}, 4.0, "the moments go to the host and back each update"),
        ],
        [same] if config.lora.rank else [same, _adapters(config)],
    ]


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
        if config.model.kv_heads % wide == 0:
            words = f"a replica of the engine on {wide} devices: each layer waits for their sums"
            yield _Step({"MeshConfig.rollout_tensor": wide}, 1.0 * doublings, words)


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


def _adapters(config: Config) -> _Step:
    settings: Settings = {"LoraConfig.rank": 16, "ModelConfig.param_dtype": "bfloat16"}
    return _Step(settings, 8.0, "adapters of rank 16 are trained, on weights frozen in bfloat16")
