"""Keys and values in 8 bits a number, with a scale for each token and KV head.

A row of numbers, which is one head of one token, is divided by a scale that makes its largest magnitude the largest
number of the narrow type, and rounded to the nearest one. No row knows of another, so what is kept of a token depends
on that token alone.

Zeros stay zeros. A row that holds a NaN or an infinity stands for NaN throughout: its numbers are 0, and its scale is
not finite.
"""

import dataclasses

import jax
import jax.numpy as jnp

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""The largest number of each type that pages can be kept in. Of int8 -128 is not used: levels lie evenly around 0."""

FLOATS = ("float32", "bfloat16", "float16")
"""Types of pages without scales."""

SMALLEST_SCALE = 2.0**-100
"""Rows of smaller numbers share this scale: quotients and products with it are far from what is flushed to zero."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """Rows of numbers of a narrow type; what they stand for is ``numbers * scales[..., None]``.

    Attributes:
        numbers: [..., H] int8 or float8_e4m3fn.
        scales: [...] float32, one for each row.
    """

    numbers: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        return self.numbers.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the numbers."""
        return self.numbers.dtype


def is_narrow(dtype: str | jnp.dtype) -> bool:
    """Whether pages of this type have scales."""
    return jnp.dtype(dtype).name in LARGEST


def token_bytes(kv_heads: int, head_width: int, dtype: str | jnp.dtype) -> int:
    """Of the key and the value of a token in one layer, with their scales if they are narrow."""
    dtype = jnp.dtype(dtype)
    scale = jnp.dtype(jnp.float32).itemsize if is_narrow(dtype) else 0
    return 2 * kv_heads * (head_width * dtype.itemsize + scale)


Pages = jax.Array | Scaled
"""Keys or values [P, K, page, H]: floats, or a narrow type with scales [P, K, page]."""


def quantized(x: jax.Array, dtype: str | jnp.dtype) -> Scaled:
    """Rows [..., H] in a narrow type: within half a scale of what they were for int8, within 2^-4 of it for float8
    (and for numbers below 2^-6 scales, within 2^-10 of a scale).

    Args:
        x: float32 or bfloat16.
        dtype: a key of ``LARGEST``.
    """
    dtype, x = jnp.dtype(dtype), x.astype(jnp.float32)
    largest = LARGEST[dtype.name]
    reach = jnp.abs(x).max(axis=-1)
    scales = jnp.maximum(reach / largest, SMALLEST_SCALE)
    numbers = jnp.clip(jnp.where(jnp.isfinite(reach)[..., None], x / scales[..., None], 0.0), -largest, largest)
    return Scaled((jnp.round(numbers) if dtype == jnp.int8 else numbers).astype(dtype), scales)


def floats(pages: Pages) -> jax.Array:
    """What pages stand for: float32 where they are scaled, and else as they are."""
    return pages.numbers.astype(jnp.float32) * pages.scales[..., None] if isinstance(pages, Scaled) else pages


def check_pages(keys: Pages, values: Pages) -> None:
    """Numbers of a narrow type come with scales, others are floats, and keys and values are in the same type.

    Raises:
        ValueError: they do not.
    """
    for name, pages in (("key", keys), ("value", values)):
        narrow = is_narrow(pages.dtype)
        if not isinstance(pages, Scaled):
            if narrow:
                raise ValueError(f"{name} pages of {pages.dtype} have no scales; give them as Scaled(numbers, scales)")
            if pages.dtype.name not in FLOATS:
                raise ValueError(f"{name} pages of {pages.dtype} cannot be had; they are {', '.join(FLOATS)} or scaled")
            continue
        if not narrow:
            raise ValueError(f"{name} pages of {pages.dtype} have scales; only {' and '.join(LARGEST)} are scaled")
        if pages.scales.shape != pages.shape[:-1] or pages.scales.dtype != jnp.float32:
            raise ValueError(
                f"{name} pages {pages.shape} need float32 scales {pages.shape[:-1]}; "
                f"got {pages.scales.dtype} {pages.scales.shape}"
            )
    if keys.dtype != values.dtype:
        raise ValueError(f"key pages of {keys.dtype} and value pages of {values.dtype}; both must be of one type")
