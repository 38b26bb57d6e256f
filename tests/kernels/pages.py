"""Pages as cases of paged attention ask for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels.paged_attention.quantized import LARGEST, Pages, Scaled, quantized


def pages_of(x: np.ndarray, dtype: str) -> Pages:
    """Of this type, with scales if it is a narrow one. What is NaN is so in the numbers too, where they can be."""
    if dtype not in LARGEST:
        return jnp.asarray(x, dtype)
    kept = jax.jit(quantized, static_argnums=1)(x, dtype)
    if dtype == "int8":
        return kept
    return dataclasses.replace(kept, numbers=jnp.where(jnp.isnan(x), jnp.nan, kept.numbers).astype(dtype))


def exactly(x: Pages) -> Pages:
    """Floats in float32; what is scaled the reference dequantises by itself."""
    return x if isinstance(x, Scaled) else x.astype(jnp.float32)
