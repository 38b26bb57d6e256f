"""The decoder: one parameter table, one layer function, two ways to attend.

Training and scoring attend over packed rows; rollout attends over KV pages. Everything else is the same code on the
same weights, so the log-probabilities of both agree to rounding. What one family has and others lack is read from its
row in ``families`` and from ``ModelConfig``.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxrl.config import ModelConfig
from jaxrl.mesh import COMPUTE_RULES, compute_spec, per_shard, pieces, to_compute
from jaxrl.model import stacks
from jaxrl.model.families import FAMILIES
from jaxrl.model.implementations import paged_implementation
from jaxrl.model.kv_pages import KVPages, written
from jaxrl.model.lora import ADAPTERS, A, B, low_rank_product, low_rank_rows
from jaxrl.model.moe import Choice, Load, experts_feed_forward, load_of, route
from jaxrl.model.packed_attention import packed_attention, score_options
from jaxrl.model.quantized import in_compute
from jaxrl.model.rotary import frequencies, lengths, rotate, rotation
from jaxrl.model.spec import ParamSpec, Specs
from jaxrl.records import Tree
from jaxrl_kernels import (
    GroupPlan,
    Groups,
    PagedPlan,
    group_decode,
    make_group_plan,
    make_paged_plan,
    paged_attention,
    segment_ends,
)
from jaxrl_kernels.paged_attention.blocks import Shape
from jaxrl_kernels.paged_attention.quantized import Pages
from jaxrl_kernels.products import product, rounded

Params = dict[str, Any]

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What the backward pass may keep, by the name in ``ModelConfig.remat``; attention scores are never kept."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""By their name in config.json."""


def param_specs(config: ModelConfig) -> Specs:
    """The table of all parameters of the decoder, layer parameters stacked on a leading L axis.

    Raises:
        ValueError: the vocabulary size is not set.
    """
    if config.vocab_size < 1:
        raise ValueError(f"ModelConfig.vocab_size={config.vocab_size} is not set; take it from the tokenizer first")
    length = {
        "layers": config.layers,
        "vocab": config.vocab_size,
        "embed": config.width,
        "query_heads": config.query_heads,
        "kv_heads": config.kv_heads,
        "head": config.head_width,
        "ffn": config.ffn_width,
        "experts": config.experts,
        "choices": config.experts,
        "expert_embed": config.width,
        "expert_ffn": config.expert_width,
    }
    family, dtype = FAMILIES[config.family], jnp.dtype(config.param_dtype)
    normal = jax.nn.initializers.normal(config.init_scale)
    zeros, unit = jax.nn.initializers.zeros, jax.nn.initializers.constant(1.0 - family.norm_offset)

    def weight(name: str, axes: str, layout: str, own: tuple[int, ...] | None = None) -> ParamSpec:
        names, lengths = tuple(axes.split()), length if own is None else {**length, "layers": len(own)}
        merged = tuple(tuple(part.split("*")) for part in layout.split())
        return ParamSpec(tuple(lengths[axis] for axis in names), dtype, names, normal, name, merged, layers=own)

    def vector(name: str, axes: str, init: Any) -> ParamSpec:
        names = tuple(axes.split())
        merged = (tuple(axis for axis in names if axis != "layers"),)
        return ParamSpec(tuple(length[axis] for axis in names), dtype, names, init, name, merged, decay=False)

    layer, attention = "model.layers.{layer}.", "model.layers.{layer}.self_attn."
    queries, keys = "query_heads*head", "kv_heads*head"
    before_ffn = "pre_feedforward" if family.post_norms else "post_attention"
    layers = {
        "attention_norm": vector(layer + "input_layernorm.weight", "layers embed", unit),
        "query": weight(attention + "q_proj.weight", "layers embed query_heads head", f"{queries} embed"),
        "key": weight(attention + "k_proj.weight", "layers embed kv_heads head", f"{keys} embed"),
        "value": weight(attention + "v_proj.weight", "layers embed kv_heads head", f"{keys} embed"),
        "output": weight(attention + "o_proj.weight", "layers query_heads head embed", f"embed {queries}"),
        "ffn_norm": vector(layer + f"{before_ffn}_layernorm.weight", "layers embed", unit),
        **_feed_forward_specs(weight, layer + "mlp.", config),
    }
    if family.post_norms:
        layers["post_attention_norm"] = vector(layer + "post_attention_layernorm.weight", "layers embed", unit)
        layers["post_ffn_norm"] = vector(layer + "post_feedforward_layernorm.weight", "layers embed", unit)
    if family.biases == "query_key_value" or config.attention_bias:
        layers["query_bias"] = vector(attention + "q_proj.bias", "layers query_heads head", zeros)
        layers["key_bias"] = vector(attention + "k_proj.bias", "layers kv_heads head", zeros)
        layers["value_bias"] = vector(attention + "v_proj.bias", "layers kv_heads head", zeros)
    if config.attention_bias:
        layers["output_bias"] = vector(attention + "o_proj.bias", "layers embed", zeros)
    if family.query_key_norm:
        layers["query_norm"] = vector(attention + "q_norm.weight", "layers head", unit)
        layers["key_norm"] = vector(attention + "k_norm.weight", "layers head", unit)
    specs: Specs = {
        "embedding": weight("model.embed_tokens.weight", "vocab embed", "vocab embed"),
        "layers": layers,
        "final_norm": vector("model.norm.weight", "embed", unit),
    }
    if not config.tie_embeddings:
        specs["head"] = weight("lm_head.weight", "vocab embed", "vocab embed")
    return specs


def _feed_forward_specs(weight: Callable[..., ParamSpec], prefix: str, config: ModelConfig) -> Specs:
    """The table of one feed-forward per layer, or of a router and experts; of both where layers differ."""
    kinds = stacks.sparse_layers(config)
    some = {kind: tuple(index for index, sparse in enumerate(kinds) if sparse == kind) for kind in set(kinds)}
    if len(some) == 1:
        some = dict.fromkeys(some)
    specs = {}
    if False in some:
        specs = {
            "gate": weight(prefix + "gate_proj.weight", "layers embed ffn", "ffn embed", some[False]),
            "up": weight(prefix + "up_proj.weight", "layers embed ffn", "ffn embed", some[False]),
            "down": weight(prefix + "down_proj.weight", "layers ffn embed", "embed ffn", some[False]),
        }
    if True not in some:
        return specs
    inwards, outwards = "layers experts expert_embed expert_ffn", "layers experts expert_ffn expert_embed"
    expert = prefix + "experts.{expert}."
    return specs | {
        "router": weight(prefix + "gate.weight", "layers embed choices", "choices embed", some[True]),
        "expert_gate": weight(expert + "gate_proj.weight", inwards, "expert_ffn expert_embed", some[True]),
        "expert_up": weight(expert + "up_proj.weight", inwards, "expert_ffn expert_embed", some[True]),
        "expert_down": weight(expert + "down_proj.weight", outwards, "expert_embed expert_ffn", some[True]),
    }


def hidden_states(
    params: Params, config: ModelConfig, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Hidden states of packed rows, after the final norm: what the output head takes.

    On a mesh the tokens of a row are split, and nothing but the keys and values of attention leaves its device.

    Args:
        tokens: [B, T] int32.
        positions: [B, T] int32, restarting in every segment.
        segment_ids: [B, T] int32; a token sees the tokens before it in its own segment, 0 is padding.

    Returns:
        [B, T, D] in the compute type.
    """
    return hidden_states_and_load(params, config, tokens, positions, segment_ids)[0]


def hidden_states_and_load(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    experts: jax.Array | None = None,
    tree: Tree | None = None,
) -> tuple[jax.Array, Load | None]:
    """``hidden_states``, and how the tokens were spread over the experts of every layer; None if there are none.

    Padding is not counted. Arguments as in ``hidden_states``, and:

    Args:
        experts: [B, T, L, k] int, to compute with instead of those that the router chooses; -1 where it does.
        tree: what is computed in place of the rows, [B, T]; a node counts as often as it has copies.
    """
    rows = ("batch", "tokens")
    if tree is None:
        attention = packed_attention(config, segment_ends(to_compute(segment_ids, ("batch", None))), None)
        counts = segment_ids > 0
    else:
        tokens, positions, counts = tree.tokens, tree.positions, tree.copies
        attention = packed_attention(config, tree.ends, tree.positions)
    positions, counts = to_compute(positions, rows), to_compute(counts, rows)

    def layer(x: jax.Array, scanned: tuple[Params, Any]) -> tuple[jax.Array, Load | None]:
        weights, (recorded, window, turning) = scanned

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            return attention(q, k, v, window), None

        turned = rotation(positions, *turning)
        x, _, choice = _layer(weights, config, x, turned, attend, rows, recorded)
        return x, None if choice is None else load_of(choice, counts)

    if config.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[config.remat])
    x = _embed(params, config, tokens, rows)
    if experts is not None:
        experts = to_compute(jnp.moveaxis(experts, 2, 0), ("layers", *rows, None))
    x, load = stacks.scan(layer, x, params["layers"], config, (experts, *_layer_constants(config)))
    return _rms_norm(x, params["final_norm"], config).astype(config.compute_dtype), load


def paged_hidden_states(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    kv_pages: KVPages,
    page_table: jax.Array,
    groups: Groups | None = None,
) -> tuple[jax.Array, KVPages]:
    """Hidden states of new tokens of rows whose earlier tokens are in KV pages; the new ones are written there too.

    Decoding is C = 1 with a row for every slot, prefill has a chunk of C tokens. Donate ``kv_pages``: the pages ride
    the scan over layers as its carry and are updated in place. A row's result does not depend on the other rows.

    Args:
        tokens: [R, C] int32.
        positions: [R, C] int32, position of each token in its row; negative = no token: nothing is written, and the
            hidden state means nothing.
        kv_pages: the pages.
        page_table: [R, M] int32, the pages of each row in order; it must cover the new positions.
        groups: of this table, for C = 1: rows that read the pages they share once for all of them.

    Returns:
        ([R, C, D] after the final norm in the compute type, the pages).
    """
    layers, pages, _, page_size = kv_pages.keys.shape[:4]
    held = jnp.take_along_axis(page_table, jnp.maximum(positions, 0) // page_size, axis=1, mode="clip")
    target = jnp.where(positions >= 0, held, layers * pages)  # out of range: dropped by the update
    offset = positions % page_size

    def update_and_attend(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        keys: Pages,
        values: Pages,
        groups: Groups | None,
        plan: Any,
        *integers: jax.Array,
    ) -> tuple[jax.Array, Pages, Pages]:
        page_table, positions, target, offset, window, first_page = integers
        target = target + first_page
        keys, values = written(keys, k, target, offset), written(values, v, target, offset)
        options = {**score_options(config), "window": window if config.sliding_layers else 0, "plan": plan}
        if groups is not None:
            arrays = (q, keys, values, page_table, positions, groups)
            return group_decode(*arrays, first_page=first_page, **options), keys, values
        return paged_attention(q, keys, values, page_table + first_page, positions, **options), keys, values

    heads = [(None, None, axis, None) for axis in ("query_heads", "kv_heads", "kv_heads")]
    pools, integers = [(None, "kv_heads")] * 2, [*[(None, None)] * 4, (), ()]
    attention = per_shard(update_and_attend, [*heads, *pools, (), (), *integers], [heads[0], *pools])
    own = paged_shape(config, positions.shape, page_size, page_table.shape[1], kv_pages.keys.dtype.name)
    plan = per_shard(functools.partial(_paged_plan, config, own), [(None, None), ()], ())(positions, groups)

    def layer(carry: tuple[jax.Array, KVPages], scanned: tuple[Params, Any]) -> tuple[tuple[jax.Array, KVPages], None]:
        x, pool = carry
        weights, (window, turning, first_page) = scanned

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[Pages, Pages]]:
            own = page_table, positions, target, offset, window, first_page
            attended, new_keys, new_values = attention(q, k, v, pool.keys, pool.values, groups, plan, *own)
            return attended, (new_keys, new_values)

        turned = rotation(positions, *turning)
        x, (keys, values), choice = _layer(weights, config, x, turned, attend, (None, None))
        pool = pool.replace(keys=keys, values=values)
        if pool.experts is not None and choice is not None:
            ids = choice.experts.astype(pool.experts.dtype)
            pool = pool.replace(experts=pool.experts.at[target + first_page, offset].set(ids, mode="drop"))
        return (x, pool), None

    x = _embed(params, config, tokens, (None, None))
    # One pool, so that no layer's pages are ever sliced out.
    pool = jax.tree.map(lambda array: array.reshape(layers * pages, *array.shape[2:]), kv_pages)
    first_pages = jnp.arange(layers, dtype=jnp.int32) * pages
    (x, pool), _ = stacks.scan(layer, (x, pool), params["layers"], config, (*_layer_constants(config), first_pages))
    hidden = _rms_norm(x, params["final_norm"], config).astype(config.compute_dtype)
    return hidden, jax.tree.map(lambda array, old: array.reshape(old.shape), pool, kv_pages)


def layer_windows(config: ModelConfig) -> list[int]:
    """The sliding windows that layers have, rising; 0 = none, and always among them."""
    return sorted({0, *_windows(config)})


def paged_shape(
    config: ModelConfig,
    queries: tuple[int, int],
    page: int,
    table: int,
    page_dtype: str,
    mesh: Mesh | AbstractMesh | None = None,
) -> Shape:
    """What a device computes of attention over KV pages.

    Args:
        queries: rows and tokens of each, R and C.
        page: tokens of a page.
        table: M, pages of a row at most.
        page_dtype: type of the numbers in pages.
        mesh: of a replica; that in use when None.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    heads = [
        count // pieces(axis, COMPUTE_RULES, mesh)
        for axis, count in (("query_heads", config.query_heads), ("kv_heads", config.kv_heads))
    ]
    return Shape(*queries, *heads, config.head_width, page, table, config.compute_dtype, page_dtype)


def _paged_plan(
    config: ModelConfig, shape: Shape, positions: jax.Array, groups: Groups | None
) -> PagedPlan | GroupPlan:
    """What is the same in all layers of how a device attends."""
    options = {"windows": layer_windows(config)[1:], "implementation": paged_implementation(config)}
    if groups is not None:
        return make_group_plan(positions, groups, shape, **options)
    return make_paged_plan(positions, shape, **options)


def _layer(
    weights: Params,
    config: ModelConfig,
    x: jax.Array,
    cosine_and_sine: tuple[jax.Array, jax.Array],
    attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]],
    rows: tuple[str | None, str | None],
    recorded: jax.Array | None = None,
) -> tuple[jax.Array, Any, Choice | None]:
    """One decoder layer on [B, T, D]; ``attend(q, k, v)`` gives the attended values and what the caller carries.

    ``rows`` names the first two axes of ``x``; ``recorded`` [B, T, k] is what ``moe.route`` takes. The third result is
    what the router chose, where there is one.

    With bfloat16 only the operands of matrix products are rounded; the residual stream, norms and rotations are float32
    throughout. A compiler may drop a rounding between two elementwise operations in one program and keep it in another,
    which would part the log-probabilities of training and decoding.
    """

    dtype = jnp.dtype(config.compute_dtype)
    axes = {name: spec.axes[1:] for name, spec in param_specs(config)["layers"].items()}
    adapters = weights.get(ADAPTERS, {})

    def multiply(equation: str, x: jax.Array, name: str, out_axes: tuple[str | None, ...]) -> jax.Array:
        """A matrix product of operands in the compute type, with a float32 result and what an adapter adds to it."""
        weight = in_compute(weights[name], dtype, axes[name])
        spec = compute_spec((*rows, *out_axes))
        y = product(equation, x.astype(dtype), weight, out_sharding=spec)
        if name not in adapters:
            return y
        return y + low_rank_product(equation, x.astype(dtype), adapters[name], axes[name], rows, out_axes)

    normed = _rms_norm(x, weights["attention_norm"], config)
    q = multiply("btd,dnh->btnh", normed, "query", ("query_heads", None))
    k = multiply("btd,dkh->btkh", normed, "key", ("kv_heads", None))
    v = multiply("btd,dkh->btkh", normed, "value", ("kv_heads", None))
    if "query_bias" in weights:
        q, k, v = (
            y + to_compute(weights[name].astype(jnp.float32), axes[name])
            for y, name in ((q, "query_bias"), (k, "key_bias"), (v, "value_bias"))
        )
    if "query_norm" in weights:
        q, k = _rms_norm(q, weights["query_norm"], config), _rms_norm(k, weights["key_norm"], config)
    q, k = rotate(q, cosine_and_sine), rotate(k, cosine_and_sine)
    attended, state = attend(q.astype(dtype), k.astype(dtype), v.astype(dtype))
    added = multiply("btnh,nhd->btd", attended, "output", (None,))
    if "output_bias" in weights:
        added = added + to_compute(weights["output_bias"].astype(added.dtype), axes["output_bias"])
    if "post_attention_norm" in weights:
        added = _rms_norm(added, weights["post_attention_norm"], config)
    x = x + added

    normed, choice = _rms_norm(x, weights["ffn_norm"], config), None
    activation = ACTIVATIONS[FAMILIES[config.family].activation]
    if "router" in weights:
        added, choice = _experts(weights, config, normed, activation, rows, recorded)
    else:
        gate = activation(multiply("btd,df->btf", normed, "gate", ("ffn",)))
        up = multiply("btd,df->btf", normed, "up", ("ffn",))
        added = multiply("btf,fd->btd", gate * up, "down", (None,))
    if "post_ffn_norm" in weights:
        added = _rms_norm(added, weights["post_ffn_norm"], config)
    return x + added, state, choice


def _experts(
    weights: Params,
    config: ModelConfig,
    normed: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
    rows: tuple[str | None, str | None],
    recorded: jax.Array | None,
) -> tuple[jax.Array, Choice]:
    """What the experts of a layer add to [B, T, D], whose first axes ``rows`` names, and which they were."""
    dtype = jnp.dtype(config.compute_dtype)
    choice = route(weights["router"], normed, config, rows, recorded)
    inwards, outwards = ("experts", "expert_embed", "expert_ffn"), ("experts", "expert_ffn", "expert_embed")
    gate, up = (in_compute(weights[name], dtype, inwards) for name in ("expert_gate", "expert_up"))
    down = in_compute(weights["expert_down"], dtype, outwards)
    adapters = {
        name.removeprefix("expert_"): (pair[A].astype(dtype), pair[B].astype(dtype))
        for name, pair in weights.get(ADAPTERS, {}).items()
        if name in stacks.SPARSE
    }
    x, chunk = normed.astype(dtype), config.expert_chunk
    return experts_feed_forward(x, choice, gate, up, down, activation, rows, chunk, adapters), choice


def _embed(params: Params, config: ModelConfig, tokens: jax.Array, rows: tuple[str | None, str | None]) -> jax.Array:
    """Rows of the embedding, rounded to the compute type, in float32.

    The table is gathered first, since a lookup in a split one is slow. Rows are rounded and not the table, so that the
    gradients of a frequent token's rows add up in the table's own type.
    """
    table = to_compute(params["embedding"], (None, None))
    spec = compute_spec((*rows, None))
    x = table.at[to_compute(tokens, rows)].get(mode="clip", out_sharding=spec)
    x = rounded(x, config.compute_dtype)
    if "embedding" in params.get(ADAPTERS, {}):
        x = x + low_rank_rows(tokens, params[ADAPTERS]["embedding"], config.compute_dtype, rows)
    if not FAMILIES[config.family].scaled_embedding:
        return x
    scale = jnp.asarray(math.sqrt(config.width), config.compute_dtype)  # rounded, as Gemma was trained
    return x * scale.astype(jnp.float32)


def _rms_norm(x: jax.Array, scale: jax.Array, config: ModelConfig) -> jax.Array:
    """Zhang and Sennrich 2019, equation 4, over the last axis, float32 in and out."""
    scaled = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps)
    return scaled * (FAMILIES[config.family].norm_offset + to_compute(scale.astype(jnp.float32), (None,)))


def _layer_constants(config: ModelConfig) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
    """What differs from layer to layer: sliding windows [L] int32 (0 = none); rotary frequencies [L, H/2] and lengths
    [L], if there are any."""
    longer = lengths(config)
    turning = jnp.asarray(frequencies(config)), None if longer is None else jnp.asarray(longer)
    return jnp.asarray(_windows(config), jnp.int32), turning


def _windows(config: ModelConfig) -> list[int]:
    """The sliding window of each layer; 0 = none."""
    return [config.sliding_window if layer in config.sliding_layers else 0 for layer in range(config.layers)]
