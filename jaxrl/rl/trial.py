"""Methods are tried before a run starts: what one does wrong is said in a line, with the key that names it."""

import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrl.config import ConfigError
from jaxrl.rl.methods import MODULE_PREFIX
from jaxrl.rl.tokens import TokenLoss


def tried(key: str, name: str, method: Callable[..., Any], *data: Any) -> Any:
    """What ``method`` gives back for ``data``.

    Args:
        key: the field that names the method, e.g. "AlgorithmConfig.loss".
        name: its value, a row of a table or "path/to/file.py:function".

    Raises:
        ConfigError: the method refused its settings, or a function of the user's raised something; the message says
            where in the file. What else a row of a table raises is a fault of ours and passes as it is.
    """
    try:
        return method(*data)
    except Exception as error:
        if isinstance(error, ConfigError) or (isinstance(error, ValueError) and ":" not in name):
            raise ConfigError(f"{key}={name!r}: {error}") from error
        if ":" not in name:
            raise
        raise ConfigError(f"{key}={name!r} raised {_in_a_line(error)}") from error


def described(value: Any) -> str:
    """What a method gave back, for a message: arrays by their shape."""
    if isinstance(value, TokenLoss):
        return f"a TokenLoss with {described(value.loss)} and metrics {described(value.metrics)}"
    if isinstance(value, jax.ShapeDtypeStruct | jax.Array | np.ndarray):
        return f"an array of shape {value.shape}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {described(one)}" for name, one in value.items()) + "}"
    return f"{value!r:.80}"


def numeric(value: Any) -> bool:
    """Whether a value is a number, or an array or a nest of them."""
    try:
        return np.asarray(value).dtype.kind in "biuf"
    except ValueError:  # of several lengths
        return False


def _in_a_line(error: Exception) -> str:
    """Name and first line of an exception, and the line of the user's file that it came from."""
    said, *_ = str(error).splitlines() or [""]
    own = [
        f" ({frame.f_code.co_filename}:{line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").startswith(MODULE_PREFIX)
    ]
    return f"{type(error).__name__}: {said}".removesuffix(": ") + "".join(own[-1:])
