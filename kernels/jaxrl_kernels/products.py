"""Matrix products as every kernel and the model take them."""

import jax
import jax.numpy as jnp


def rounded(x: jax.Array, dtype: str | jnp.dtype) -> jax.Array:
    """float32 values that ``dtype`` can hold, in float32. A compiler may drop a cast there and back, but not this."""
    kept = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=kept.nexp, mantissa_bits=kept.nmant)


def product(
    equation: str, left: jax.Array, right: jax.Array, *, out_sharding: jax.sharding.PartitionSpec | None = None
) -> jax.Array:
    """An einsum of two operands with a float32 result, in which float32 operands keep all their bits.

    Accelerators by default round float32 operands to TF32 or bfloat16, differently for different shapes: decoding and
    training would then disagree about log-probabilities by 1e-3. Operands in bfloat16 cost the same either way.
    """
    return jnp.einsum(
        equation,
        left,
        right,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )
