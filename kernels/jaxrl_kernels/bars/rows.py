"""What all rows of the table have in common: the sizes that are measured, how time is taken, how a row is written."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxrl_kernels.choice import device_kind


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are those of the demands.

    Attributes:
        lengths: of rows of one segment, rising; the last is that of the row of ``segments`` too.
        prompt, response, group: tokens of a group's prompt and of each of its responses, in training.
        slots, context: rows that decode, and tokens of each.
        shared, own: tokens that the slots of a group share in decoding, and those of each by itself.
        scored, hidden, vocabulary, chunk: tokens whose log-probabilities are taken, so many at once.
        square: side of the matrices whose product is the rate of the run.
        copied: numbers that are copied, for the bandwidth of the run.
        rounds: after one that is not counted.
    """

    lengths: tuple[int, ...] = (8192, 16384, 32768)
    query_heads: int = 32
    kv_heads: int = 8
    width: int = 128
    segments: int = 8
    prompt: int = 8192
    response: int = 1024
    group: int = 16
    slots: int = 64
    context: int = 8192
    page: int = 64
    shared: int = 8192
    own: int = 4096
    scored: int = 32768
    hidden: int = 5120
    vocabulary: int = 151936
    chunk: int = 1024
    square: int = 8192
    copied: int = 1 << 30
    rounds: int = 20
    dtype: str = "bfloat16"


def row(
    figure: str, what: str, value: float | str | None, unit: str, demand: str = "", good: str = "", note: str = ""
) -> dict:
    """A row; without a value nothing holds or fails, and the note says why there is none."""
    holds = None
    if demand and value is not None:
        sign, limit = demand.split()
        holds = value >= float(limit) if sign == ">=" else value <= float(limit)
    if isinstance(value, float):
        value = float(f"{value:.4g}") if math.isfinite(value) else str(value)  # which JSON has no number for
    shown = {"figure": figure, "what": what, "value": value, "unit": unit, "demand": demand, "good": good}
    return shown | {"holds": holds, "note": note, "device": device_kind(), "jax": jax.__version__}


def seconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turns; each runs once before."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            jax.block_until_ready(run())
            taken[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def seconds_of(run: Callable[..., Any], arguments: tuple, sizes: Sizes) -> float:
    return seconds({"run": functools.partial(run, *arguments)}, sizes.rounds)["run"]


def random(number: int, dtype: str, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(number), shape, dtype)
