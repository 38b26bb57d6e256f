"""The table of what the kernels must reach: ratios to what else computes the same, all measured in one run.

On a GPU the rival is cuDNN, on a TPU splash; elsewhere the rows that need one have no value, and say why. The demands
and what is good beyond them are those of the kernels' specification.
"""

import shutil
import subprocess
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxrl_kernels.bars import attention, decoding, rows, scoring
from jaxrl_kernels.bars.rows import Sizes
from jaxrl_kernels.choice import device_kind
from jaxrl_kernels.interval_attention.backends import BACKENDS

__all__ = ["Sizes", "table"]

DATA_SHEET = {
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Products of bfloat16 operands, FLOP/s, as the makers say."""

CLOCKS = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
"""What nvidia-smi is asked for."""


def table(sizes: Sizes) -> Iterator[dict]:
    """All rows, as they are measured; last those of kernels that "auto" does not take, which may end the process."""
    kernels = [name for name, backend in BACKENDS.items() if backend.devices != ("",)]
    kernels.sort(key=lambda name: not BACKENDS[name].automatic)
    yield from _clocks("before")
    rate, bandwidth = yield from _of_the_run(sizes)
    yield from _guarded("K3", "decoding", decoding.measured(sizes, bandwidth))
    yield from _guarded("K4", "log-probabilities", scoring.measured(sizes))
    for backend in ("xla", *kernels):
        yield from _guarded("K1", backend, attention.measured(sizes, backend, rate))
    yield from _clocks("after")


def _clocks(when: str) -> Iterator[dict]:
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        yield rows.row("run", f"clocks {when}", done.stdout.strip() or done.stderr.strip(), CLOCKS)


def _guarded(figure: str, name: str, measured: Iterator[dict]) -> Iterator[dict]:
    """What is measured, and where that raised, a row that does not hold, so that the table goes on."""
    try:
        yield from measured
    except (RuntimeError, ValueError) as error:
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        yield rows.row(figure, f"{name}: the rest", None, "ratio", note=said) | {"holds": False}


def _of_the_run(sizes: Sizes) -> Iterator[dict]:
    """FLOP/s of a square product, and bytes/s of a copy, read and written."""
    left, right = (rows.random(number, sizes.dtype, sizes.square, sizes.square) for number in range(2))
    rate = 2 * sizes.square**3 / rows.seconds_of(jax.jit(jnp.matmul), (left, right), sizes)
    sheet = next((most for kind, most in DATA_SHEET.items() if device_kind().startswith(kind)), None)
    yield rows.row("run", f"product of {sizes.square} x {sizes.square}", rate / 1e12, "TFLOP/s", note=sizes.dtype)
    share, note = (rate / sheet, "") if sheet else (None, f"the table has no {device_kind()!r}")
    yield rows.row("run", "of the data sheet's rate", share, "share", note=note)
    source = jnp.zeros(sizes.copied, sizes.dtype)
    bandwidth = 2 * source.nbytes / rows.seconds_of(jax.jit(lambda x: x + 1), (source,), sizes)
    yield rows.row("run", "copy, read and written", bandwidth / 1e9, "GB/s")
    return rate, bandwidth
