"""Matrix products as every kernel and the model take them."""

import jax
import jax.numpy as jnp


def rounded(x: jax.Array, dtype: str | jnp.dtype) -> jax.Array:
    """float32 values that ``dtype`` can hold, in float32. A compiler may drop a cast there and back, but not this."""
    kept = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=kept.nexp, mantissa_bits=kept.nmant)


def precision_of(dtype: str | jnp.dtype) -> jax.lax.Precision | None:
    """How a matrix product of operands of this type is told to keep all of their bits.

    Accelerators by default round float32 operands to TF32 or bfloat16, differently for different shapes: decoding and
    training would then disagree about log-probabilities by 1e-3. Of bfloat16 all bits are multiplied anyhow, and
    Mosaic, which compiles kernels and ``ragged_dot`` for TPUs, refuses to be told so.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def product(
    equation: str, left: jax.Array, right: jax.Array, *, out_sharding: jax.sharding.PartitionSpec | None = None
) -> jax.Array:
    """An einsum of two operands with a float32 result, in which float32 operands keep all their bits.

    So does the gradient of the result, which is float32 whatever the operands and is multiplied in the way that the
    product is told: hence as ``precision_of`` float32.
    """
    return jnp.einsum(
        equation,
        left,
        right,
        precision=precision_of("float32"),
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )
