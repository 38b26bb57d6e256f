"""Rotary position embeddings (Su et al. 2021), with the frequencies of every layer."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.config import ModelConfig


def frequencies(config: ModelConfig) -> np.ndarray:
    """[L, H/2] float32, the radians by which each pair turns from one position to the next, layer by layer.

    Layers that slide may have a base of their own, which is never scaled.
    """
    full = _scaled(_unscaled(config.rope_theta, config.head_width), config)
    local = _unscaled(config.local_rope_theta, config.head_width) if config.local_rope_theta else full
    return np.stack([local if layer in config.sliding_layers else full for layer in range(config.layers)])


def rotation(positions: jax.Array, layer_frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, T, 1, H/2] of the angles of positions [B, T] in one layer."""
    angles = positions[..., None, None].astype(jnp.float32) * layer_frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cosine_and_sine: tuple[jax.Array, jax.Array]) -> jax.Array:
    """[B, T, heads, H] with the pairs (i, i + H/2) turned, as Hugging Face weights expect; float32 in and out."""
    cosine, sine = cosine_and_sine
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def _unscaled(theta: float, head_width: int) -> np.ndarray:
    """Equation 15."""
    # Rounded on the host in the steps in which transformers rounds: at position 30,000 a last bit of a frequency is a
    # thousandth of a radian, and a compiler would turn 1 / x ** y into x ** -y.
    exponent = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    return np.float32(1) / np.float32(theta ** exponent.astype(np.float64))


def _scaled(unscaled: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Frequencies for longer texts than the model was first trained on.

    "linear" divides all of them (Chen et al. 2023, equation 4). "llama3" divides those that turn less than
    ``rope_low_frequency`` times in the first training length, leaves those that turn more than ``rope_high_frequency``
    times, and goes from one to the other in between (Llama 3.1, as transformers computes it).
    """
    factor = np.float32(config.rope_factor)
    match config.rope_scaling:
        case "none":
            return unscaled
        case "linear":
            return unscaled / factor
    low, high = np.float32(config.rope_low_frequency), np.float32(config.rope_high_frequency)
    period = np.float32(2 * math.pi) * (1 / unscaled)  # torch multiplies by the inverse: see the rounding above
    turns = np.float32(config.rope_trained_positions) * (1 / period)
    kept = np.clip((turns - low) / (high - low), np.float32(0), np.float32(1))
    return (1 - kept) * unscaled / factor + kept * unscaled
