"""The devices a run can be checked for, by name: ``v5p-64``, ``2x v5e-256``, ``h200x8``, or ``this`` machine."""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterator
from typing import Literal

from jaxrl.config import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do at best, as its maker says; no device reaches it.

    Attributes:
        memory: bytes that a program can use; of a TPU what its compiler grants.
        flops: products of bfloat16 operands, FLOP/s.
        memory_rate: bytes/s between the device and its memory.
        link_rate: bytes/s that leave the device for its neighbours (TPU: the slice; GPU: the host).
        outer_rate: bytes/s that leave it for other slices or hosts.
        source: of the rates.
    """

    platform: Literal["tpu", "gpu"]
    memory: int
    flops: float
    memory_rate: float
    link_rate: float
    outer_rate: float
    source: str


_TPU_PAGES = "cloud.google.com/tpu/docs/"
_NVIDIA_PAGES = "nvidia.com/en-us/data-center/"

# Links of a TPU are half of the bidirectional figure of its page; its share of the host's network follows from the page
# as well. A GPU's link is half of NVLink's figure, and its share of the network one adapter of 400 Gb/s.
CHIPS: dict[str, Chip] = {
    "v5e": Chip("tpu", int(15.75 * GIB), 197e12, 819e9, 200e9, 3.1e9, _TPU_PAGES + "v5e"),
    "v5p": Chip("tpu", int(95.74 * GIB), 459e12, 2765e9, 600e9, 6.2e9, _TPU_PAGES + "v5p"),
    "v6e": Chip("tpu", int(31.25 * GIB), 918e12, 1638e9, 400e9, 12.5e9, _TPU_PAGES + "v6e"),
    "h100": Chip("gpu", 84_929_347_584, 989e12, 3352e9, 450e9, 50e9, _NVIDIA_PAGES + "h100"),
    "h200": Chip("gpu", 150_121_545_728, 989e12, 4800e9, 450e9, 50e9, _NVIDIA_PAGES + "h200"),
}

_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
}
SHAPES: dict[str, dict[int, str]] = {"v5p": _CUBES, "v5e": _FLAT, "v6e": _FLAT}
"""Of each TPU, the shape of a slice by its number of chips."""

TPUS_PER_PROCESS = 4
GPUS_PER_HOST = 8

GPU_SHARE = 0.75
"""Of a GPU's memory, what jax takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""

EXAMPLES = ("v5p-64", "v5e-8", "v5e-256", "v6e-16", "2x v5e-256", "h100x8", "h200x8", "h200x64", "this")


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices by kind and number. ``chip`` is empty for this machine, whose devices the compiling process counts."""

    name: str
    chip: str = ""
    slices: int = 1
    count: int = 0
    """Chips of a slice, or GPUs in all."""

    @property
    def platform(self) -> str:
        """ "tpu", "gpu" or "this"."""
        return CHIPS[self.chip].platform if self.chip else "this"

    @property
    def devices(self) -> int:
        return self.slices * self.count

    @property
    def of_process(self) -> int:
        """Devices of one process; 0 for this machine, where it has all."""
        most = {"tpu": TPUS_PER_PROCESS, "gpu": GPUS_PER_HOST, "this": 0}[self.platform]
        return min(most, self.count)

    def memory(self, share: float = GPU_SHARE) -> int:
        """Bytes of one device that jax can use.

        Args:
            share: of a GPU's memory.
        """
        chip = CHIPS[self.chip]
        return int(chip.memory * share) if chip.platform == "gpu" else chip.memory

    @property
    def topology(self) -> str:
        """As the compiler names it."""
        if self.platform == "tpu":
            return f"{self.chip}:{SHAPES[self.chip][self.count]}"
        hosts = -(-self.count // GPUS_PER_HOST)
        return f"1x{hosts}x{self.count // hosts}"

    def other_kinds(self) -> list["Target"]:
        """The smallest of each other kind that the same compiler knows, of as many slices."""
        kinds = {chip: min(SHAPES.get(chip, (1,))) for chip, sheet in CHIPS.items() if sheet.platform == self.platform}
        return [
            Target(_name(chip, self.slices, count), chip, self.slices, count)
            for chip, count in kinds.items()
            if chip != self.chip
        ]

    def and_larger(self) -> Iterator["Target"]:
        """This one and all larger ones of its kind; of GPUs, each with twice as many as the one before."""
        counts = SHAPES.get(self.chip) or (self.count << doublings for doublings in itertools.count())
        for count in counts:
            if count >= self.count:
                yield dataclasses.replace(self, name=_name(self.chip, self.slices, count), count=count)


def parse(name: str) -> Target:
    """The target of this name; the number is that of chips.

    Raises:
        ConfigError: no such kind or size; the message has the nearest name and all kinds.
    """
    if name == "this":
        return Target(name)
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?(v\d+\w?)-(\d+)|(h\d+)x(\d+)", name.strip().lower())
    if match is None:
        raise ConfigError(_unknown(name))
    slices, tpu, chips, gpu, gpus = match.groups()
    if gpu:
        count = int(gpus)
        if gpu not in CHIPS:
            raise ConfigError(_unknown(name))
        if count < 1 or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
            raise ConfigError(
                f"--target {name}: {count} GPUs are no number of whole hosts; give 1 to {GPUS_PER_HOST}, or a multiple "
                f"of {GPUS_PER_HOST}"
            )
        return Target(_name(gpu, 1, count), gpu, 1, count)
    if tpu not in SHAPES:
        raise ConfigError(_unknown(name))
    number, count = int(slices or 1), int(chips)
    if count not in SHAPES[tpu] or number < 1:
        sizes = ", ".join(f"{tpu}-{size}" for size in SHAPES[tpu])
        raise ConfigError(f"--target {name}: there is no such slice; choose one of {sizes}, or several: 2x {tpu}-4")
    return Target(_name(tpu, number, count), tpu, number, count)


def _name(chip: str, slices: int, count: int) -> str:
    if chip not in SHAPES:
        return f"{chip}x{count}"
    return f"{slices}x {chip}-{count}" if slices > 1 else f"{chip}-{count}"


def _unknown(name: str) -> str:
    known = [*(f"{chip}-{count}" for chip, sizes in SHAPES.items() for count in sizes), *EXAMPLES]
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.3)
    nearest = f"; did you mean {close[0]}?" if close else "."
    return (
        f"--target {name}: no such target{nearest} Targets: v5e-, v5p-, v6e- and a number of chips, with '2x ' "
        f"before it two slices; h100x, h200x and a number of GPUs; this. For example {', '.join(EXAMPLES)}"
    )
