"""Rotary position embeddings (Su et al. 2021), with the frequencies of every layer."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.config import ConfigError, ModelConfig

USUAL_HIGH_FREQUENCY = {"llama3": 4.0, "yarn": 32.0}
"""What ``ModelConfig.rope_high_frequency=0`` takes: of Llama 3.1's config.json, and of YaRN (Peng et al. 2023)."""


def frequencies(config: ModelConfig) -> np.ndarray:
    """[L, H/2] float32, the radians by which each pair turns from one position to the next, layer by layer.

    Layers that slide may have a base of their own, which is never scaled.
    """
    full = _scaled(_unscaled(config.rope_theta, config.head_width), config)
    local = _unscaled(config.local_rope_theta, config.head_width) if config.local_rope_theta else full
    return np.stack([local if layer in config.sliding_layers else full for layer in range(config.layers)])


def lengths(config: ModelConfig) -> np.ndarray | None:
    """[L] float32, by which rotated queries and keys are longer, layer by layer; None where they never are.

    YaRN sharpens attention over longer texts (Peng et al. 2023, equation 22): 0.1 ln(factor) + 1 of both.
    """
    if config.rope_scaling != "yarn":
        return None
    length = config.rope_attention_factor or yarn_length(config.rope_factor)
    local = set(config.sliding_layers) if config.local_rope_theta else set()
    return np.array([1.0 if layer in local else length for layer in range(config.layers)], np.float32)


def yarn_length(factor: float, weight: float = 1.0) -> float:
    """YaRN's length for a stretch; ``weight`` is what transformers calls ``mscale``."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def high_frequency(config: ModelConfig) -> float:
    """Of a ``rope_scaling`` that looks at it, the turns above which pairs are not stretched.

    Raises:
        ConfigError: they would be no more than those below which pairs are stretched wholly.
    """
    usual = USUAL_HIGH_FREQUENCY[config.rope_scaling]
    if not config.rope_high_frequency and config.rope_low_frequency >= usual:
        raise ConfigError(
            f"ModelConfig.rope_low_frequency={config.rope_low_frequency} must be below the {usual} that "
            f"rope_high_frequency=0 takes for rope_scaling={config.rope_scaling!r}; lower it, or set the latter"
        )
    return config.rope_high_frequency or usual


def rotation(
    positions: jax.Array, layer_frequencies: jax.Array, length: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, T, 1, H/2] of the angles of positions [B, T] in one layer, times ``length``."""
    angles = positions[..., None, None].astype(jnp.float32) * layer_frequencies
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    return (cosine, sine) if length is None else (cosine * length, sine * length)


def rotate(x: jax.Array, cosine_and_sine: tuple[jax.Array, jax.Array]) -> jax.Array:
    """[B, T, heads, H] with the pairs (i, i + H/2) turned, as Hugging Face weights expect; float32 in and out."""
    cosine, sine = cosine_and_sine
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def _unscaled(theta: float, head_width: int) -> np.ndarray:
    """Equation 15."""
    return np.float32(1) / _powers(theta, head_width)


def _powers(theta: float, head_width: int) -> np.ndarray:
    """What the angles of a position are divided by."""
    # Rounded on the host in the steps in which transformers rounds: at position 30,000 a last bit of a frequency is a
    # thousandth of a radian, and a compiler would turn 1 / x ** y into x ** -y.
    exponent = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    return np.float32(theta ** exponent.astype(np.float64))


def _scaled(unscaled: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Frequencies for longer texts than the model was first trained on.

    "linear" divides all of them (Chen et al. 2023, equation 4). "llama3" divides those that turn less than
    ``rope_low_frequency`` times in the first training length, leaves those that turn more than ``high_frequency``
    times, and goes from one to the other in between (Llama 3.1, as transformers computes it). "yarn" does as well, but
    goes by the number of the pair (Peng et al. 2023, section 3.2, as transformers rounds it).
    """
    factor = np.float32(config.rope_factor)
    match config.rope_scaling:
        case "none":
            return unscaled
        case "linear":
            return unscaled / factor
        case "yarn":
            return _by_pair(unscaled, config)
    low, high = np.float32(config.rope_low_frequency), np.float32(high_frequency(config))
    period = np.float32(2 * math.pi) * (1 / unscaled)  # torch multiplies by the inverse: see the rounding above
    turns = np.float32(config.rope_trained_positions) * (1 / period)
    kept = np.clip((turns - low) / (high - low), np.float32(0), np.float32(1))
    return (1 - kept) * unscaled / factor + kept * unscaled


def _by_pair(unscaled: np.ndarray, config: ModelConfig) -> np.ndarray:
    def pair(turns: float) -> float:
        """That turns so often in the first training length."""
        base = 2 * math.log(config.rope_theta)
        return config.head_width * math.log(config.rope_trained_positions / (turns * 2 * math.pi)) / base

    first = max(math.floor(pair(high_frequency(config))), 0)
    last = min(math.ceil(pair(config.rope_low_frequency)), config.head_width - 1)
    between = np.float32(last - first if last != first else 0.001)
    kept = 1 - np.clip((np.arange(len(unscaled), dtype=np.float32) - np.float32(first)) / between, 0, 1)
    stretched = np.float32(1) / (np.float32(config.rope_factor) * _powers(config.rope_theta, config.head_width))
    return stretched * (1 - kept) + unscaled * kept
