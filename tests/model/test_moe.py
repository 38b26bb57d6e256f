"""Experts against a loop over tokens, the router against the recorded model, and what its load says."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import ModelConfig
from jaxrl.model import hf, moe, transformer

CONFIG = ModelConfig(
    family="qwen3_moe", vocab_size=40, layers=2, width=12, query_heads=2, kv_heads=1, head_width=6, ffn_width=8,
    experts=5, experts_per_token=2, expert_width=7,
)  # fmt: skip
BATCH, TOKENS = 3, 11


def inputs(dtype: str = "float32", skew: float = 0.0) -> tuple[jax.Array, ...]:
    """(x, router, gate, up, down); with ``skew`` nearly every token chooses the first experts."""
    generator = np.random.default_rng(0)
    experts, width, hidden = CONFIG.experts, CONFIG.width, CONFIG.expert_width
    x = generator.normal(size=(BATCH, TOKENS, width)) + skew
    router = generator.normal(size=(width, experts)) + skew * np.arange(experts)[::-1]
    shapes = [(experts, width, hidden), (experts, width, hidden), (experts, hidden, width)]
    weights = [jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes]
    return jnp.asarray(x, jnp.float32), jnp.asarray(router, jnp.float32), *weights


def reference(config: ModelConfig, x: jax.Array, router: jax.Array, *weights: jax.Array) -> jax.Array:
    """Every expert on every token, in float32, then the chosen ones picked out."""
    gate, up, down = (weight.astype(jnp.float32) for weight in weights)
    probabilities = jax.nn.softmax(jnp.einsum("btd,de->bte", x, router), axis=-1)
    threshold = jnp.sort(probabilities, axis=-1)[..., -config.experts_per_token, None]
    kept = jnp.where(probabilities >= threshold, probabilities, 0.0)
    if config.normalize_expert_weights:
        kept = kept / kept.sum(axis=-1, keepdims=True)
    outputs = [jax.nn.silu(x @ gate[e]) * (x @ up[e]) @ down[e] for e in range(config.experts)]
    return jnp.einsum("ebtd,bte->btd", jnp.stack(outputs), kept)


def feed_forward(config: ModelConfig, x: jax.Array, router: jax.Array, *weights: jax.Array) -> jax.Array:
    choice = moe.route(router, x, config)
    return moe.experts_feed_forward(x.astype(weights[0].dtype), choice, *weights, jax.nn.silu)


@pytest.mark.parametrize(("per_token", "normalize"), [(1, True), (2, True), (2, False), (5, True)])
@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_no_token_is_dropped_and_gradients_are_right(per_token: int, normalize: bool, skew: float) -> None:
    config = dataclasses.replace(CONFIG, experts_per_token=per_token, normalize_expert_weights=normalize)
    arguments = inputs(skew=skew)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=arguments[0].shape), jnp.float32)

    def run(function: object) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def total(*arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
            output = function(config, *arguments)
            return jnp.sum(weights * output), output

        gradients, output = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3, 4), has_aux=True))(*arguments)
        return output, gradients

    load = moe.load_of(moe.route(arguments[1], arguments[0], config), jnp.ones((BATCH, TOKENS), bool))
    if skew and per_token < 5:
        assert float(load.chosen.max()) > 0.9 * BATCH * TOKENS and float(load.chosen.min()) == 0
    (got, got_gradients), (wanted, wanted_gradients) = run(feed_forward), run(reference)
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3, rtol=1e-3), got_gradients, wanted_gradients)


@pytest.mark.parametrize("chunk", [1, 5, 32, 33])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_compute_in_chunks_what_they_compute_at_once(chunk: int, dtype: str) -> None:
    """Gradients of the matrices are sums over chunks, rounded once, as they are at once."""
    x, router, *matrices = inputs(dtype, skew=0.5)
    choice = moe.route(router, x, CONFIG)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    def run(chunk: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def total(x: jax.Array, mixed: jax.Array, *matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
            chosen = choice.replace(weights=mixed)
            output = moe.experts_feed_forward(x.astype(dtype), chosen, *matrices, jax.nn.silu, chunk=chunk)
            return jnp.sum(weights * output), output

        gradient = jax.jit(jax.value_and_grad(total, argnums=tuple(range(5)), has_aux=True))
        (_, output), gradients = gradient(x, choice.weights, *matrices)
        return output, gradients

    (output, gradients), (whole, of_whole) = run(chunk), run(0)
    np.testing.assert_allclose(output, whole, rtol=1e-5, atol=1e-5)
    bound = 1e-5 if dtype == "float32" else 2**-8  # half the distance of neighbours in bfloat16
    for one, other in zip(gradients, of_whole, strict=True):
        size = float(jnp.abs(other.astype(jnp.float32)).max())
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=bound, atol=bound * size)


@pytest.mark.parametrize("skew", [0.0, 3.0])
@pytest.mark.parametrize(("names", "chunk"), [(("gate", "up", "down"), 0), (("gate", "up", "down"), 5), (("up",), 0)])
def test_adapters_of_experts_are_their_matrices_plus_a_product(names: tuple[str, ...], chunk: int, skew: float) -> None:
    """Output, and gradients of inputs, router and factors, whatever the load; idle experts' factors have gradient 0."""
    x, router, *weights = inputs(skew=skew)
    generator, rank = np.random.default_rng(3), 2
    matrices = dict(zip(("gate", "up", "down"), weights, strict=True))
    adapters = {
        name: tuple(
            jnp.asarray(0.5 * generator.normal(size=size), jnp.float32)
            for size in ((CONFIG.experts, matrix.shape[1], rank), (CONFIG.experts, rank, matrix.shape[2]))
        )
        for name, matrix in matrices.items()
        if name in names
    }
    factor = jnp.asarray(generator.normal(size=x.shape), jnp.float32)

    def factored(x: jax.Array, router: jax.Array, adapters: moe.Pairs) -> jax.Array:
        choice = moe.route(router, x, CONFIG)
        return moe.experts_feed_forward(x, choice, *weights, jax.nn.silu, chunk=chunk, adapters=adapters)

    def merged(x: jax.Array, router: jax.Array, adapters: moe.Pairs) -> jax.Array:
        added = {name: jnp.einsum("eir,ero->eio", *pair) for name, pair in adapters.items()}
        return reference(CONFIG, x, router, *(matrix + added.get(name, 0) for name, matrix in matrices.items()))

    def run(function: object) -> tuple[jax.Array, object]:
        def total(*arguments: object) -> tuple[jax.Array, jax.Array]:
            output = function(*arguments)
            return jnp.sum(factor * output), output

        gradients, output = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(x, router, adapters)
        return output, gradients

    (got, got_gradients), (wanted, wanted_gradients) = run(factored), run(merged)
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3, rtol=1e-3), got_gradients, wanted_gradients)
    if skew:
        assert not got_gradients[2]["up"][0][-1].any() and got_gradients[2]["up"][0][0].any()


def test_bfloat16_rounds_the_operands_of_experts_but_not_of_the_router() -> None:
    arguments = inputs("bfloat16")
    got = jax.jit(lambda *arguments: feed_forward(CONFIG, *arguments))(*arguments)
    wanted = reference(CONFIG, *arguments)
    assert got.dtype == jnp.float32
    assert float(jnp.abs(got - wanted).max()) < 0.02 * float(jnp.abs(wanted).max())
    x, router, *_ = arguments
    probabilities = jax.nn.softmax(x @ router, axis=-1)
    np.testing.assert_allclose(moe.route(router, x, CONFIG).probabilities, probabilities, rtol=1e-5)


def test_the_load_counts_real_tokens_and_adds_up() -> None:
    x, router, *_ = inputs()
    choice = moe.route(router, x, CONFIG)
    real = jnp.asarray(np.random.default_rng(2).random((BATCH, TOKENS)) < 0.7)
    load = moe.load_of(choice, real)
    chosen = np.bincount(np.asarray(choice.experts)[np.asarray(real)].reshape(-1), minlength=CONFIG.experts)
    np.testing.assert_array_equal(load.chosen, chosen)
    np.testing.assert_allclose(
        load.probability, np.asarray(choice.probabilities)[np.asarray(real)].sum(axis=0), rtol=1e-5
    )
    assert float(load.tokens) == float(real.sum())
    rest = moe.load_of(choice, ~real)
    whole = moe.load_of(choice, jnp.ones_like(real))
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-5), load, rest, whole)


def test_load_metrics_show_the_busiest_expert_and_idle_ones() -> None:
    load = moe.Load(
        chosen=jnp.asarray([[4.0, 4.0, 4.0, 4.0], [12.0, 4.0, 0.0, 0.0]]),
        probability=jnp.ones((2, 4)),
        tokens=jnp.ones(2),
    )
    metrics = moe.load_metrics(load)
    assert (float(metrics["expert_load_max"]), float(metrics["idle_experts"])) == (3.0, 0.25)
    nothing = load.replace(chosen=jnp.zeros((2, 4)))
    assert float(moe.load_metrics(nothing)["expert_load_max"]) == 0 and float(moe.balance_loss(nothing)) >= 0


def test_an_even_load_has_the_least_balance_loss_and_uneven_ones_are_pushed_apart() -> None:
    even = moe.Load(chosen=jnp.full((2, 5), 8.0), probability=jnp.full((2, 5), 4.0), tokens=jnp.full((2,), 20.0))
    assert float(moe.balance_loss(even)) == pytest.approx(2.0)
    one = even.replace(chosen=even.chosen.at[:, 0].add(8.0).at[:, 1].add(-8.0))
    gradient = jax.grad(lambda probability: moe.balance_loss(one.replace(probability=probability)))(one.probability)
    assert (gradient[:, 0] > gradient[:, 2]).all() and (gradient[:, 2] > gradient[:, 1]).all()
    heavy = one.replace(probability=one.probability.at[:, 0].add(2.0).at[:, 1].add(-2.0))
    assert float(moe.balance_loss(heavy)) > 2.0


def test_router_and_balance_loss_are_those_of_the_recorded_model(shared: pathlib.Path) -> None:
    folder = shared / "golden" / "models" / "qwen3_moe"
    config, params = hf.load_folder(folder)
    case = json.loads((folder / "golden.json").read_text())["cases"][0]
    with np.load(folder / "golden.npz") as arrays:
        tokens, positions, mask = (arrays[f"plain/{key}"] for key in ("input_ids", "position_ids", "attention_mask"))
        wanted = [arrays[key[1:]] for key in case["outputs"]["router_topk_sorted"]]
    rows = [jnp.asarray(x, jnp.int32) for x in (tokens, positions, mask)]
    _, load = jax.jit(transformer.hidden_states_and_load, static_argnums=1)(params, config, *rows)
    assert float(moe.balance_loss(load)) == pytest.approx(case["outputs"]["router_aux_loss"], rel=1e-4)
    chosen = [np.bincount(experts.reshape(-1), minlength=config.experts) for experts in wanted]
    np.testing.assert_array_equal(load.chosen, chosen)
    np.testing.assert_array_equal(load.tokens, mask.sum())
