"""Low-rank adapters: a frozen matrix W [in, out] is used as W + scale * A B, with A [in, rank] and B [rank, out].

Hu et al. 2021, "LoRA", section 4.1; the scale is alpha / rank, or alpha / sqrt(rank) as in Kalajdzievski 2023. The two
factors are multiplied one after the other and never added to W while a policy is trained or sampled: an update is often
smaller than the rounding of a bfloat16 weight.

Which matrices can have adapters, and how these lie, follows from the table of parameters: adapters are a table of the
same kind, from which their initial values, shardings, weight decay and names in PEFT's files are derived. Every expert
has its own pair; of the embedding, A is looked up as its rows are.
"""

import difflib
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl.config import ConfigError, LoraConfig
from jaxrl.mesh import compute_spec, to_compute
from jaxrl.model.quantized import Quantized, all_rounded, matching, quantized_specs
from jaxrl.model.spec import ParamSpec, Specs
from jaxrl_kernels.products import product

ADAPTERS = "adapters"
"""Where the decoder's parameters and those of its layers hold adapters, by the name of the matrix."""

A, B = "lora_a", "lora_b"
"""The two factors, [L, inputs..., rank] and [L, rank, outputs...]; of experts [L, E, ...], outside the layers without
L."""

OUTSIDE = ("embedding", "head")
"""Matrices that are not in the layers."""

RANK = "rank"
"""Logical name of the axis between the two factors."""

ALL = "all-linear"
"""Target that stands for every linear map of the layers, as in PEFT, but for the router of experts."""

Adapters = dict[str, dict[str, Any]]
"""Matrix -> factor -> array."""


def adaptable(specs: Specs) -> dict[str, ParamSpec]:
    """The layers' linear maps, those of experts included, and the embedding and the output head where these are two.

    A router stays as it is: the least change of its scores changes which experts compute a token.

    Args:
        specs: the decoder's table.
    """
    layers = {name: spec for name, spec in specs["layers"].items() if len(spec.hf_layout) == 2 and name != "router"}
    return layers | ({name: specs[name] for name in OUTSIDE} if "head" in specs else {})


def adapter_specs(specs: Specs, config: LoraConfig) -> Specs:
    """The table of the adapters that ``config`` asks for.

    They are float32 whatever the type of the frozen weights, so that small updates are not lost.

    Args:
        specs: the decoder's table.

    Raises:
        ConfigError: a target that names no matrix; the message has the nearest names.
    """
    matrices = adaptable(specs)
    wanted: set[str] = set()
    for target in config.targets:
        matching = {
            name
            for name, spec in matrices.items()
            if (target == ALL and name not in OUTSIDE) or _names(target, name, spec)
        }
        if not matching:
            raise ConfigError(_unknown(target, specs))
        wanted |= matching
    return {name: _pair(name, spec, config.rank) for name, spec in matrices.items() if name in wanted}


def base_specs(specs: Specs, config: LoraConfig) -> Specs:
    """The table of the weights beneath adapters: ``specs``, in codes where ``config`` says so."""
    return specs if config.base == "none" else quantized_specs(specs, config.base)


def module(spec: ParamSpec) -> str:
    """Path of the matrix's module in the Hugging Face model, or in a layer of it, such as ``self_attn.q_proj``."""
    return spec.hf_name.rpartition("{layer}.")[2].removesuffix(".weight")


def scale_of(config: LoraConfig) -> float:
    """The factor of A B."""
    return config.alpha / (math.sqrt(config.rank) if config.rank_stabilized else config.rank)


@flax.struct.dataclass
class Base:
    """Frozen weights, and the factor of what adapters add to them."""

    params: Any
    scale: float = flax.struct.field(pytree_node=False)

    def adapted(self, adapters: Adapters) -> dict[str, Any]:
        """Parameters of the decoder that computes with these weights and adapters. Copies no weight."""
        return attached(self.params, scaled(adapters, self.scale))

    def merged(self, adapters: Adapters) -> dict[str, Any]:
        """Parameters without adapters: W + scale * A B, added in float32 and rounded once to the type of W.

        Parameters that have no adapter are those of the base, not copies; what the base has in codes is rounded to
        floats, with and without an adapter.
        """

        def summed(params: dict[str, Any]) -> dict[str, Any]:
            return {
                name: _sum(params[name], self.scale, **pair, transposed=name == "head")
                for name, pair in adapters.items()
                if name in params
            }

        layers = self.params["layers"]
        return all_rounded({**self.params, **summed(self.params), "layers": {**layers, **summed(layers)}})


def scaled(adapters: Adapters, scale: float) -> Adapters:
    """The adapters with ``scale`` in their second factor, as the decoder takes them."""
    return {name: {A: pair[A], B: scale * pair[B]} for name, pair in adapters.items()}


def attached(params: dict[str, Any], adapters: Adapters) -> dict[str, Any]:
    """``params`` with ``scaled`` adapters at the places where the decoder looks for them."""
    outside = {name: pair for name, pair in adapters.items() if name in OUTSIDE}
    inside = {name: pair for name, pair in adapters.items() if name not in OUTSIDE}
    whole = {**params, "layers": {**params["layers"], ADAPTERS: inside}}
    return {**whole, ADAPTERS: outside} if outside else whole


def specs_with_adapters(specs: Specs, params: dict[str, Any]) -> Specs:
    """The decoder's table as ``params`` are: with codes where they have any, and that of the attached adapters."""
    own, inside = matching(specs, params), params["layers"].get(ADAPTERS)
    if inside is None:
        return own
    pairs, matrices = {**inside, **params.get(ADAPTERS, {})}, adaptable(specs)
    return attached(own, {name: _pair(name, matrices[name], pair[A].shape[-1]) for name, pair in pairs.items()})


def low_rank_product(
    equation: str,
    x: jax.Array,
    adapter: dict[str, jax.Array],
    axes: tuple[str, ...],
    rows: tuple[str | None, str | None],
    out_axes: tuple[str | None, ...],
) -> jax.Array:
    """What a layer's adapter adds to the product of ``x`` with its matrix, float32.

    Args:
        equation: of that product, such as ``btd,dnh->btnh``.
        x: [B, T, inputs...] in the compute type.
        adapter: ``scaled``, without the axis of the layers.
        axes: logical axes of the matrix.
        rows: logical axes of B and T.
        out_axes: logical axes of the result after [B, T].
    """
    operands, result = equation.split("->")
    left, matrix = operands.split(",")
    inputs = "".join(letter for letter in matrix if letter in left)
    first = to_compute(adapter[A].astype(x.dtype), (*axes[: len(inputs)], RANK))
    second = to_compute(adapter[B].astype(x.dtype), (RANK, *axes[len(inputs) :]))
    narrow = product(f"{left},{inputs}r->btr", x, first, out_sharding=compute_spec((*rows, RANK)))
    spec = compute_spec((*rows, *out_axes))
    return product(f"btr,r{matrix[len(inputs) :]}->{result}", narrow.astype(x.dtype), second, out_sharding=spec)


def low_rank_rows(
    tokens: jax.Array, adapter: dict[str, jax.Array], dtype: str | jnp.dtype, rows: tuple[str | None, str | None]
) -> jax.Array:
    """What the embedding's adapter adds to the rows of ``tokens`` [B, T], float32 [B, T, D].

    Args:
        adapter: ``scaled``; [V, rank] and [rank, D].
        dtype: the compute type.
        rows: logical axes of B and T.
    """
    first, second = to_compute(adapter[A], (None, None)), to_compute(adapter[B].astype(dtype), (None, None))
    spec = compute_spec((*rows, None))
    narrow = first.at[to_compute(tokens, rows)].get(mode="clip", out_sharding=spec)
    return product("btr,rd->btd", narrow.astype(dtype), second, out_sharding=spec)


def _pair(name: str, spec: ParamSpec, rank: int) -> Specs:
    """Factors drawn as in PEFT, with a product of 0: training starts from the frozen weights.

    A is uniform within 1 / sqrt(inputs) and B is 0; of the embedding, whose rows are looked up, A is 0 and B normal.
    """
    outputs, inputs = spec.hf_layout
    embedding = name == "embedding"
    if embedding:
        inputs, outputs = outputs, inputs
    length = dict(zip(spec.axes, spec.shape, strict=True)) | {RANK: rank}
    bound = 1 / math.sqrt(math.prod(length[axis] for axis in inputs))
    drawn, zeros = functools.partial(_uniform, bound=bound), jax.nn.initializers.zeros
    path = "base_model.model." + spec.hf_name.removesuffix(".weight")
    kind, suffix = ("lora_embedding_", "") if embedding else ("lora_", ".weight")

    def factor(axes: tuple[str, ...], init: Any, letter: str, layout: tuple[tuple[str, ...], ...]) -> ParamSpec:
        shape, hf_name = tuple(length[axis] for axis in axes), f"{path}.{kind}{letter}{suffix}"
        return ParamSpec(shape, jnp.dtype(jnp.float32), axes, init, hf_name, layout, layers=spec.layers)

    first, second = (zeros, jax.nn.initializers.normal(1.0)) if embedding else (drawn, zeros)
    return {
        A: factor((*spec.stacked_axes, *inputs, RANK), first, "A", ((RANK,), inputs)),
        B: factor((*spec.stacked_axes, RANK, *outputs), second, "B", (outputs, (RANK,))),
    }


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, *, bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)


@functools.partial(jax.jit, static_argnames="transposed")
def _sum(
    weight: jax.Array | Quantized, scale: float, lora_a: jax.Array, lora_b: jax.Array, transposed: bool
) -> jax.Array:
    """``transposed``: the matrix has its outputs first."""
    floats = weight.rounded(jnp.float32) if isinstance(weight, Quantized) else weight.astype(jnp.float32)
    stacked = "le"[: lora_a.ndim + lora_b.ndim - 2 - floats.ndim]
    inputs, outputs = "abc"[: lora_a.ndim - 1 - len(stacked)], "xyz"[: lora_b.ndim - 1 - len(stacked)]
    result = f"{stacked}{outputs}{inputs}" if transposed else f"{stacked}{inputs}{outputs}"
    added = product(f"{stacked}{inputs}r,{stacked}r{outputs}->{result}", lora_a, lora_b)
    return (floats + scale * added).astype(weight.dtype)


def _names(target: str, name: str, spec: ParamSpec) -> bool:
    """Whether a target is a matrix's name here, or the end of its module's path as PEFT matches it."""
    return target == name or f".{module(spec)}".endswith(f".{target}")


def _unknown(target: str, specs: Specs) -> str:
    matrices = adaptable(specs)
    valid = [ALL, *matrices, *(module(spec).rpartition(".")[2] for spec in matrices.values())]
    close = difflib.get_close_matches(target, valid, n=2, cutoff=0.4)
    nearest = f"did you mean {' or '.join(close)}? " if close else ""
    if "head" not in specs and target.rpartition(".")[2] in ("embedding", "embed_tokens", "head", "lm_head"):
        nearest = (
            "embedding and output head are one matrix here (ModelConfig.tie_embeddings), which an adapter of either "
            "would part: start from a folder that has both; or "
        )
    known = ", ".join(f"{name} ({module(spec)})" for name, spec in matrices.items())
    return (
        f"LoraConfig.targets has {target!r}, which names no matrix that can have an adapter; {nearest}"
        f"choose from {ALL} and: {known}"
    )
