"""Keys and values of all layers in pages that rows take and give back, as floats or in 8 bits a number."""

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.config import ModelConfig
from jaxrl.mesh import ROLLOUT_RULES, partition_spec
from jaxrl.model.moe import id_type
from jaxrl_kernels.paged_attention.quantized import Pages, Scaled, is_narrow, quantized
from jaxrl_kernels.paged_attention.quantized import token_bytes as of_layer


@flax.struct.dataclass
class KVPages:
    """Pages of all layers; scales of narrow ones are [L, P, K, page]."""

    keys: Pages  # [L, P, K, page, H]
    values: Pages  # [L, P, K, page, H]
    experts: jax.Array | None = None  # [L, P, page, experts of a token], which computed the token; None = not recorded


KV_AXES = ("layers", "pages", "kv_heads")
"""First logical axes of keys, values and scales; recorded experts are not split."""


def page_dtype(config: ModelConfig, kv_dtype: str) -> jnp.dtype:
    """Type of the numbers in pages, by ``EngineConfig.kv_dtype``."""
    return jnp.dtype(config.compute_dtype if kv_dtype == "auto" else kv_dtype)


def token_bytes(config: ModelConfig, kv_dtype: str) -> int:
    """Bytes of the keys and values of a token in all layers, with their scales."""
    return config.layers * of_layer(config.kv_heads, config.head_width, page_dtype(config, kv_dtype))


def init_pages(
    config: ModelConfig, pages: int, page_size: int, record_experts: bool = False, kv_dtype: str = "auto"
) -> KVPages:
    """Empty KV pages, ``page_size`` tokens each.

    Args:
        kv_dtype: as ``EngineConfig.kv_dtype``.
    """
    shape, dtype = (config.layers, pages, config.kv_heads, page_size, config.head_width), page_dtype(config, kv_dtype)

    def empty() -> Pages:
        numbers = jnp.zeros(shape, dtype)
        return Scaled(numbers, jnp.zeros(shape[:-1], jnp.float32)) if is_narrow(dtype) else numbers

    if not record_experts:
        return KVPages(empty(), empty())
    recorded = (config.layers, pages, page_size, config.experts_per_token)
    return KVPages(empty(), empty(), jnp.zeros(recorded, id_type(config.experts)))


def page_shardings(mesh: Mesh, pages: KVPages) -> KVPages:
    """Where each array of a replica's pages lies; a program that takes them gives them back with the same shardings.

    Args:
        pages: shapes are enough.
    """

    def by_head(array: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = (*KV_AXES, *[None] * (array.ndim - len(KV_AXES)))
        return NamedSharding(mesh, partition_spec(axes, ROLLOUT_RULES, mesh))

    keys, values = jax.tree.map(by_head, (pages.keys, pages.values))
    return KVPages(keys, values, None if pages.experts is None else NamedSharding(mesh, PartitionSpec()))


def written(pages: Pages, new: jax.Array, target: jax.Array, offset: jax.Array) -> Pages:
    """Pages [P, K, page, H] with new tokens [R, C, K, H] at their pages and offsets [R, C], in the type of the pages.

    Pages are written as the rows they consist of: told of two axes, a TPU's compiler would lay out all pages anew for
    it and once more for the kernel that reads them.
    """
    _, kv_heads, page, _ = pages.shape
    row = (target[..., None] * kv_heads + jnp.arange(kv_heads)) * page + offset[..., None]

    def put(pool: jax.Array, part: jax.Array) -> jax.Array:
        return pool.reshape(-1, *pool.shape[3:]).at[row].set(part, mode="drop").reshape(pool.shape)

    return jax.tree.map(put, pages, quantized(new, pages.dtype) if isinstance(pages, Scaled) else new)
