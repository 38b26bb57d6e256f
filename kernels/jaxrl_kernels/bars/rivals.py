"""Attention by others, where the devices at hand have it: what the kernels are measured against."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_kernels import choice
from jaxrl_kernels.choice import device_kind
from jaxrl_kernels.interval_attention import interval_attention
from jaxrl_kernels.interval_attention.backends import BACKENDS, Shape

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(q [B, T, N, H], k and v [B, T, K, H], end [B, T]) -> [B, T, N, H]."""

BLOCK = 512
"""Of splash, in queries and in keys."""


def causal() -> tuple[str, Attention | None]:
    """Its name, and attention over rows of one segment, which reads no ``end``; None where there is none."""
    kind = device_kind()
    if kind.startswith("NVIDIA"):
        plain = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        return "cuDNN", lambda q, k, v, end: plain(q, k, v)
    if kind.startswith("TPU"):
        return "splash", lambda q, k, v, end: splash(q, k, v, None)
    return "cuDNN or splash", None


def packed(shape: Shape) -> tuple[str, Attention | None]:
    """The same for rows of segments of a shape, told apart as the rival tells them."""
    kind = device_kind()
    if kind.startswith("NVIDIA"):
        can = not choice.refusal(BACKENDS["cudnn"], [shape])
        by_cudnn = functools.partial(interval_attention, implementation="cudnn")
        return "cuDNN's packed offsets", by_cudnn if can else None
    if kind.startswith("TPU"):
        return "splash with segment ids", splash
    return "cuDNN or splash", None


def splash(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array | None) -> jax.Array:
    """Of segments that are told apart by their ends, if these are given."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    tokens, heads, width = q.shape[1:]
    block = min(BLOCK, tokens)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((tokens, tokens))] * heads)
    kernel = splash_attention_kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    q, k, v = (x.swapaxes(1, 2) for x in ((q * width**-0.5).astype(q.dtype), k, v))
    if end is None:
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)
    ids = splash_attention_kernel.SegmentIds(end, end)
    return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2).astype(jnp.result_type(q))
